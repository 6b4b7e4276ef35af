"""Laws of a named study: its cells are its own, travel, and are computed once."""

from __future__ import annotations

import json
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path

from ..systems.base import StudySystem
from . import cells
from .hosted_laws import enter
from .laws import Broken

STUDY_LAWS: dict[str, Callable[[StudySystem], str]] = {}


@enter(STUDY_LAWS)
def cells_are_told_apart(system: StudySystem) -> str:
    """Every cell has a name and a key of its own, and goes to another process whole."""
    job = system.comparison()
    names = [job.name(cell) for cell in job.cells]
    keys = {json.dumps(job.key(cell), sort_keys=True) for cell in job.cells}
    if not names:
        raise Broken("there is no cell")
    if len(set(names)) < len(names) or len(keys) < len(names):
        raise Broken(f"{len(names)} cells have {len(set(names))} names and {len(keys)} keys")
    there = pickle.loads(pickle.dumps(job))
    if [there.key(cell) for cell in there.cells] != [job.key(cell) for cell in job.cells]:
        raise Broken("in another process the cells have other keys")
    return f"{len(names)} cells"


@enter(STUDY_LAWS)
def a_small_run_resumes_and_reports(system: StudySystem) -> str:
    """The smallest run gives a summary and a page; a second one measures nothing and gives the same."""
    job = type(system)(**system.small).comparison()
    with tempfile.TemporaryDirectory() as folder:
        first = cells.run(job, Path(folder))
        computed: list[bool] = []
        again = cells.run(job, Path(folder), lambda cell, fresh: computed.append(fresh))
    if any(computed):
        raise Broken(f"a second run measures {sum(computed)} of {len(computed)} cells again")
    if json.dumps(job.summary(first)) != json.dumps(job.summary(again)):
        raise Broken("the same cells are summed up in two ways")
    page = job.page(first, "saccade study", 0.0).html()
    if job.page(first, "", 0.0).title not in page:
        raise Broken("the page lacks its title")
    return f"{len(first)} cells"
