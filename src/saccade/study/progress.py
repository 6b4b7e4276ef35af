"""One progress bar for all long work of claims: on a terminal by rich, elsewhere silent."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Tell = Callable[[str, int], None]
"""Called with what is at work now, and how many steps were done since the last call."""


@contextmanager
def bar(total: int, what: str = "training") -> Iterator[Tell]:
    """A bar of ``total`` steps on standard error while the context is open."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as shown:
        line = shown.add_task(what, total=total)
        yield lambda description, steps: shown.update(line, description=description, advance=steps)
