"""A study's page: figures and tables in one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .models import environment


@dataclass(frozen=True)
class Table:
    """Rows under named columns; numbers are rounded for people and sorted whole, ``None`` is a dash."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    words: str = ""


@dataclass(frozen=True)
class Page:
    """What a study found, for people. ``parts``: figures as :func:`saccade.study.plots.svg` returns, and tables."""

    title: str
    intro: str
    parts: Sequence[dict[str, str] | Table]
    command: str
    seconds: float

    def html(self) -> str:
        """As one page."""
        return template("page.html.j2").render(page=self, told=told, environment=environment(None))

    def table(self) -> Any:
        """The first table, for the terminal."""
        from rich import box
        from rich.table import Table as Shown

        first = next(part for part in self.parts if isinstance(part, Table))
        shown = Shown(title=f"{self.title}: {first.title}", caption=first.words, box=box.SIMPLE_HEAD, pad_edge=False)
        for name in first.columns:
            shown.add_column(name, justify="right" if name != first.columns[0] else "left")
        for row in first.rows:
            shown.add_row(*map(told, row))
        return shown


def told(value: Any) -> str:
    """A value as people read it."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def template(name: str) -> Any:
    """A template of this folder."""
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    found = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return found.get_template(name)
