"""Cells: the measurements that a study consists of, each kept in a file of its own as soon as it is done.

A cell's file is named after everything that determines what is in it. So an interrupt loses at most the cells in
progress, the next run computes what is missing, and a changed model, program or engine computes anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from .page import Page

# A cell, what was measured, the seconds that it took.
Measured = tuple[Any, dict[str, Any], float]


class Job(Protocol):
    """A study: cells that can be measured in any order, each alone. It can be pickled where it runs on a cluster."""

    @property
    def cells(self) -> Sequence[Any]:
        """All cells (hashable, picklable), in the order in which they are measured and reported."""

    def name(self, cell: Any) -> str:
        """A short name, unique among the cells: of the file, and for the progress bar."""

    def key(self, cell: Any) -> dict[str, Any]:
        """Everything that determines what the cell measures, as JSON values."""

    def measure(self, cell: Any) -> dict[str, Any]:
        """Measure it; JSON values."""


class Comparison(Job, Protocol):
    """A named study (:class:`saccade.systems.base.StudySystem`)."""

    def summary(self, found: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """What all cells together say (``found``: in the order of the cells), as JSON values."""

    def page(self, found: Sequence[dict[str, Any]], command: str, seconds: float) -> Page:
        """The same for people."""


def in_turn(job: Job, cells: Sequence[Any]) -> Iterator[Measured]:
    """Measure one cell after the other, here."""
    for cell in cells:
        start = time.perf_counter()
        result = job.measure(cell)
        yield cell, result, time.perf_counter() - start


def run(
    job: Job,
    folder: Path,
    on_cell: Callable[[Any, bool], None] = lambda cell, computed: None,
    spread: Callable[[Job, Sequence[Any]], Iterator[Measured]] = in_turn,
) -> list[dict[str, Any]]:
    """Measure every cell that has no file in ``folder`` yet: ``key``, ``result``, ``seconds`` of all, in their order.

    Args:
        on_cell: called once for each cell, with whether it was computed now.
        spread: who measures, and where (:func:`in_turn`, or :func:`saccade.study.cluster.over`).
    """
    folder.mkdir(parents=True, exist_ok=True)
    keys = {cell: job.key(cell) for cell in job.cells}
    files = {cell: folder / f"{job.name(cell)}.{_digest(key)}.json" for cell, key in keys.items()}
    known = {cell: found for cell, path in files.items() if (found := _read(path)) is not None}
    for cell in known:
        on_cell(cell, False)
    missing = [cell for cell in keys if cell not in known]
    for cell, result, seconds in spread(job, missing) if missing else ():
        known[cell] = {"key": keys[cell], "result": result, "seconds": round(seconds, 2)}
        write_whole(files[cell], json.dumps(known[cell], indent=1))
        on_cell(cell, True)
    return [known[cell] for cell in keys]


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_text(text)
    part.replace(path)


def sources(*files: Path) -> str:
    """A hash of source files, for keys."""
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(files))).hexdigest()[:12]


def _digest(key: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]


def _read(path: Path) -> dict[str, Any] | None:
    """A finished cell, or ``None``: a file that is not one (a full disk, an edit) is computed again."""
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return known if isinstance(known, dict) and "result" in known else None
