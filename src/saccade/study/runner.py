"""The main study: systems x tasks x lengths on one model."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..core.errors import SpecError, Unsupported
from ..hosts.handles import host_of
from . import cells, measure, models, programs, tasks

SPEED = "speed"


@dataclass(frozen=True)
class Settings:
    """What a study does. ``model``: a directory or Hub id, or ``None`` for the zoo's; ``count``: samples per cell."""

    model: str | None = None
    systems: tuple[str, ...] = programs.DEFAULT
    tasks: tuple[str, ...] = tasks.DEFAULT
    lengths: tuple[int, ...] = (512, 1024, 2048)
    count: int = 8
    repeats: int = 5
    steps: int = 8
    seed: int = 0

    def check(self) -> None:
        """Refuse what means nothing, before anything is loaded.

        Raises:
            SpecError: with what to write instead.
        """
        for name in self.tasks:
            if name not in tasks.NAMES:
                raise SpecError(f"unknown task {name!r}: there are {', '.join(tasks.NAMES)}")
        for name, value in (("count", self.count), ("repeats", self.repeats), ("steps", self.steps)):
            if value < 1:
                raise SpecError(f"{name} must be at least 1; got {value}")
        if not (self.lengths and self.tasks):
            raise SpecError("a study needs at least one length and one task")
        short = [n for n in self.lengths if n < 16]
        if short:
            raise SpecError(f"lengths must be at least 16 tokens; got {short[0]}")


@dataclass(frozen=True)
class Cell:
    """One measurement: a task of a system at a length, or (task ``speed``) what the system costs there."""

    entry: programs.Entry
    task: str
    length: int


@dataclass
class Study:
    """A loaded model and the cells to measure on it, in a directory.

    Raises:
        SpecError: unknown systems or tasks, a model that is none, lengths that do not fit.
    """

    settings: Settings
    out: Path
    model: Any = None
    tokenizer: Any = None
    given: bool = field(init=False)

    def __post_init__(self) -> None:
        self.settings.check()
        self.given = self.model is not None
        self.entries = programs.resolve(self.settings.systems)
        if self.model is None:
            self.model, self.tokenizer = models.load(self.settings.model)
        self.vocabulary = tasks.vocabulary(self.model, self.tokenizer)
        self.heads = int(self.model.config.num_attention_heads)
        models.fits(self.model, self.settings.lengths)
        try:
            for task in self.settings.tasks:
                for length in self.settings.lengths:
                    self.vocabulary.samples(task, length, self.settings.seed, 1)
        except ValueError as error:  # a world that has no room says what it needs
            raise SpecError(str(error)) from error
        with programs.find("dense").inside(self.model):
            pass  # a model that cannot run programs says so now

    @property
    def cells(self) -> list[Cell]:
        """All cells, short ones first, so that a first look comes early."""
        return [
            Cell(entry, task, length)
            for length in sorted(set(self.settings.lengths))
            for task in [*dict.fromkeys(self.settings.tasks), SPEED]
            for entry in self.entries
        ]

    def run(
        self, on_cell: Callable[[Cell, bool], None] = lambda cell, computed: None, **how: Any
    ) -> list[dict[str, Any]]:
        """Measure every cell that is not there yet (:func:`saccade.study.cells.run`); results as :attr:`cells`."""
        found = cells.run(self, self.out / "cells", on_cell, **how)
        return [
            {"system": cell.entry.name, "task": cell.task, "length": cell.length, **known}
            for cell, known in zip(self.cells, found, strict=True)
        ]

    def name(self, cell: Cell) -> str:
        """Of the cell's file."""
        return f"{cell.entry.name}.{cell.task}.{cell.length}"

    def __reduce__(self) -> Any:
        """A study travels as its settings: the other process loads the model itself."""
        if self.given:
            raise SpecError("a study of a model that was handed over stays in this process: give the model's name")
        return Study, (self.settings, self.out)

    def key(self, cell: Cell) -> dict[str, Any]:
        """Everything that determines what a cell measures."""
        key: dict[str, Any] = {
            "model": self.fingerprint,
            "system": cell.entry.name,
            "program": cell.entry.settings(self.heads),
            "source": cell.entry.code,
            "task": cell.task,
            "length": cell.length,
            "seed": self.settings.seed,
            "saccade": __version__,
            "engine": engine(),
            "torch": torch.__version__,
        }
        if cell.task != SPEED:
            return {**key, "count": self.settings.count}
        return {
            **key,
            "repeats": self.settings.repeats,
            "steps": self.settings.steps,
            "threads": torch.get_num_threads(),
            "machine": models.environment(self.model)["machine"],
        }

    @cached_property
    def fingerprint(self) -> str:
        """Tells the model from every other."""
        return models.fingerprint(self.model)

    def measure(self, cell: Cell) -> dict[str, Any]:
        """What the system does on the task, or what it costs; a system that cannot says why."""
        build = cell.entry.build
        try:
            if cell.task == SPEED:
                (sample,) = self.vocabulary.samples(tasks.TEXT, cell.length, self.settings.seed, 1)
                tokens = sample.tokens[None].to(self.model.device)
                return measure.speed(
                    self.model, cell.entry.inside, tokens, repeats=self.settings.repeats, steps=self.settings.steps,
                    program=None if build is None else lambda layer, heads: build(heads),
                )  # fmt: skip
            with cell.entry.inside(self.model) as fresh:
                samples = self.vocabulary.samples(cell.task, cell.length, self.settings.seed, self.settings.count)
                watched = watchable(self.model)
                return summed([tasks.score(self.model, sample, fresh(), watched) for sample in samples])
        except (SpecError, Unsupported) as error:
            return {"refused": str(error)}


def watchable(model: Any) -> bool:
    """Can saccade see where the model looks?"""
    try:
        return bool(host_of(model).sites())
    except (SpecError, Unsupported):
        return False


def summed(scores: Sequence[dict[str, float]]) -> dict[str, Any]:
    """One value for a cell (all answers or all bytes together), its spread over the samples, and the counts."""
    over, under, name = ("bits", "bytes", "bits_per_byte") if "bits" in scores[0] else ("right", "asked", "accuracy")
    totals = {part: sum(s[part] for s in scores) for part in (over, under)}
    each = measure.Spread.of([s[over] / s[under] for s in scores])
    found = {name: totals[over] / totals[under], "spread": asdict(each), **totals}
    if all("looked" in s for s in scores):
        found["looked"] = sum(s["looked"] for s in scores) / totals[under]
    return found


@cache
def engine() -> str:
    """A hash of the sources that compute and measure; taken once, as they were when this process began to run them."""
    here = Path(__file__).parent
    files = [
        *here.parent.glob("core/*.py"),
        *here.parent.glob("hosts/*.py"),
        *here.parent.glob("cache/*.py"),
        here / "measure.py",
        here / "tasks.py",
    ]
    return cells.sources(*files)


def summarise(cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per system and length: quality, and cost as a multiple of the untouched model's in the same run.

    ``accuracy`` and ``looked`` are means over the recall tasks; a ratio is the median of the rounds' ratios. ``None``:
    not measured.
    """
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for cell in cells:
        row = rows.setdefault((cell["system"], cell["length"]), {"tasks": {}, "looked": {}})
        result = cell["result"]
        if "refused" in result:
            row["refused"] = result["refused"]
        elif cell["task"] == SPEED:
            row["speed"] = result
        elif cell["task"] == tasks.TEXT:
            row["bits_per_byte"] = result["bits_per_byte"]
        else:
            row["tasks"][cell["task"]] = result["accuracy"]
            if "looked" in result:
                row["looked"][cell["task"]] = result["looked"]
    table = []
    for (system, length), row in rows.items():
        speed, dense = row.get("speed"), rows.get(("dense", length), {})
        accuracy = _mean(row["tasks"])
        line = {
            "system": system,
            "length": length,
            "accuracy": accuracy,
            "accuracy_minus_dense": _minus(accuracy, _mean(dense.get("tasks", {}))),
            "by_task": row["tasks"],
            "looked": _mean(row["looked"]),
            "looked_by_task": row["looked"],
            "bits_per_byte": row.get("bits_per_byte"),
            "bits_per_byte_minus_dense": _minus(row.get("bits_per_byte"), dense.get("bits_per_byte")),
            "output_error": speed and speed["output_error"],
            "prefill_ratio": speed and speed["prefill_ratio"],
            "decode_ratio": speed and speed["decode_ratio"],
            "memory_ratio": speed and _over(speed["prefill_peak_bytes"], speed["prefill_peak_bytes_dense"]),
            "cache_ratio": speed and _over(speed["cache_bytes"], speed["cache_bytes_dense"]),
            "refused": row.get("refused"),
        }
        table.append(line)
    return table


def _mean(by_task: dict[str, float]) -> float | None:
    return statistics.fmean(by_task.values()) if by_task else None


def _minus(value: float | None, other: float | None) -> float | None:
    return None if value is None or other is None else value - other


def _over(value: float, other: float) -> float | None:
    return value / other if other else None
