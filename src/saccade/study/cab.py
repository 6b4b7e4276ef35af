"""The study ``cab``: every system in each attention pattern it can have, after Comprehensive Attention Benchmark.

A cell is one system in one pattern: trained on the pattern's tasks from one seed (:mod:`.cab_tasks`), or timed. The
layer around a system is made as every backbone makes it (:class:`saccade.nn.backbones.Place`), so whatever a backbone
can hold can be compared.
"""

from __future__ import annotations

import hashlib
import inspect
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, cached_property, partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import __version__, catalog
from ..core.errors import SpecError, Unsupported
from ..nn.attention import MultiHead
from ..nn.backbones import Place, mechanism
from ..systems.base import CacheSystem, MethodSystem, StudySystem, System
from . import cells, plots
from .cab_tasks import PATTERNS, TASKS, Training, train
from .claims import interleaved, machine
from .measure import peak_bytes
from .page import Page, Table

DENSE = "dense"
WIDTH, HEADS = 256, 4  # of the layer that is timed
EAGER = 4096  # the greatest length at which the N x M matrix of the eager layer is made
LINEAR, QUADRATIC = 1, 2
REFERENCES = ("eager", DENSE)
SHORT = {pattern: "".join(word[0].upper() for word in pattern.split()) for pattern in PATTERNS}

Scores = Mapping[str, Mapping[str, float]]
"""By task and metric."""


@dataclass(frozen=True)
class Cell:
    """One system in one pattern; trained from a seed, or (``None``) timed."""

    system: str
    pattern: str
    seed: int | None


@dataclass(frozen=True)
class Cab:
    """The comparison. ``systems``: slugs; all of the catalogue if not given. Other fields: see the system ``cab``.

    Raises:
        SpecError: an unknown pattern or system, or fewer than three lengths.
    """

    systems: tuple[str, ...] | None
    patterns: tuple[str, ...]
    budgets: Mapping[str, Mapping[str, Any]]
    seeds: tuple[int, ...]
    training: Training
    lengths: tuple[int, ...]
    rounds: int

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.patterns) - set(PATTERNS)):
            raise SpecError(f"cab: unknown pattern {unknown[0]!r}: there are {', '.join(PATTERNS)}")
        fitted = sum(length <= EAGER for length in self.lengths)
        if fitted <= QUADRATIC or list(self.lengths) != sorted(set(self.lengths)):
            raise SpecError(
                f"cab: a parabola is fitted to times of up to {EAGER} tokens, so 3 rising lengths up to there are"
                f" needed; got {self.lengths}"
            )
        if not self.seeds or self.rounds < 1:
            raise SpecError(f"cab: give a seed and a round at least; got seeds={self.seeds}, rounds={self.rounds}")

    @cached_property
    def found(self) -> dict[str, type[System]]:
        """The systems that are asked for, by slug."""
        known = catalog.systems()
        wanted = known if self.systems is None else [name for name in self.systems if name != DENSE]
        return {name: known[name] if name in known else catalog.find(name) for name in wanted}

    @property
    def left_out(self) -> dict[str, str]:
        """Systems that are no layer of attention, with what they are."""
        return {name: why for name, kind in self.found.items() if (why := no_layer(kind)) is not None}

    @property
    def cells(self) -> list[Cell]:
        """By pattern; dense first, which has no time of its own: it is timed beside every other."""
        names = [DENSE, *(name for name in self.found if name not in self.left_out)]
        return [
            Cell(name, pattern, seed)
            for pattern in self.patterns
            for name in names
            for seed in (*self.seeds, *(() if name == DENSE else (None,)))
        ]

    def name(self, cell: Cell) -> str:
        """Of the cell's file."""
        last = "time" if cell.seed is None else f"seed{cell.seed}"
        return f"{cell.system}.{cell.pattern.replace(' ', '-')}.{last}"

    def key(self, cell: Cell) -> dict[str, Any]:
        """Everything that determines what a cell measures."""
        kind = self.found.get(cell.system)
        module = None if kind is None else inspect.getmodule(kind)
        key: dict[str, Any] = {
            "system": cell.system,
            "settings": _said(self.made(cell)),
            "source": "" if module is None else hashlib.sha256(inspect.getsource(module).encode()).hexdigest()[:12],
            "pattern": cell.pattern,
            "seed": cell.seed,
            "saccade": __version__,
            "engine": sources(),
            "torch": torch.__version__,
            "training": asdict(self.training),
        }
        if cell.seed is not None:
            return key
        speed = {"lengths": self.lengths, "rounds": self.rounds, "width": WIDTH, "heads": HEADS}
        return key | speed | {"threads": torch.get_num_threads(), "machine": machine()}

    def made(self, cell: Cell) -> System | None:
        """The system of a cell: with its budget where it is trained, else as published. Dense is ``None``."""
        if cell.system == DENSE:
            return None
        kind = self.found[cell.system]
        given = dict(self.budgets.get(cell.system, {})) if cell.seed is not None else {}
        if unknown := sorted(set(given) - set(kind.settings())):
            raise SpecError(f"cab: {cell.system} has no setting {unknown[0]!r}: there are {', '.join(kind.settings())}")
        return kind(**(given | ({"causal": cell.pattern == "causal self"} if "causal" in kind.settings() else {})))

    def measure(self, cell: Cell) -> dict[str, Any]:
        """The metrics of each task, or seconds and bytes at each length; or why the pattern is refused."""
        try:
            system = self.made(cell)
            if (why := refusal(system, cell.pattern, self.training)) is not None:
                return {"refused": why}
            if cell.seed is None:
                return self._timed(system, cell.pattern)
            tasks = [task for task in TASKS.values() if task.pattern == cell.pattern]
            return {"tasks": {task.name: train(task, self.training, system, cell.seed) for task in tasks}}
        except (SpecError, Unsupported, NotImplementedError) as error:
            return {"refused": str(error)}
        except Exception as error:  # a mistake in one system is one row; when it is mended the key is another
            return {"refused": f"it fails: {type(error).__name__}: {error}"}

    @torch.no_grad()
    def _timed(self, system: System | None, pattern: str) -> dict[str, Any]:
        causal, crosses = pattern == "causal self", pattern.endswith("cross")
        layers = {
            "system": layer_of(system, causal, WIDTH, HEADS),
            DENSE: layer_of(None, causal, WIDTH, HEADS),
            "eager": MultiHead(Eager(causal), WIDTH, HEADS),
        }
        seconds: dict[str, list[float]] = {name: [] for name in layers}
        most: dict[str, list[int]] = {name: [] for name in layers}
        for length in self.lengths:
            rng = torch.Generator().manual_seed(length)
            x, context = torch.randn(2, 1, length, WIDTH, generator=rng).split(1)
            given = (x[0], context[0]) if crosses else (x[0],)
            work = {
                name: partial(layer, *given) for name, layer in layers.items() if name != "eager" or length <= EAGER
            }
            times = interleaved(work, self.rounds)
            for name, call in work.items():
                seconds[name].append(times.median(name))
                most[name].append(peak_bytes(call, x.device))
        return {"lengths": list(self.lengths), "seconds": seconds, "bytes": most}

    def summary(self, found: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Rows by pattern and system, who is in none and why, and how the patterns' indices go together."""
        results = {cell: known["result"] for cell, known in zip(self.cells, found, strict=True)}
        rows = [row for pattern in self.patterns for row in self._rows(pattern, results)]
        return {"rows": rows, "left_out": self.left_out, "correlation": correlations(rows)}

    def _rows(self, pattern: str, results: Mapping[Cell, dict[str, Any]]) -> list[dict[str, Any]]:
        names = list(dict.fromkeys(cell.system for cell in results if cell.pattern == pattern))
        runs = {name: [results[Cell(name, pattern, seed)] for seed in self.seeds] for name in names}
        scores = {
            name: [{task: _metrics(task, one) for task, one in run["tasks"].items()} for run in each]
            for name, each in runs.items()
            if not any("refused" in run for run in each)
        }
        index = composite(scores)
        rows = []
        for name in names:
            timed = results.get(Cell(name, pattern, None))
            row: dict[str, Any] = {"system": name, "pattern": pattern, "refused": None, "index": None}
            row["settings"] = _said(self.made(Cell(name, pattern, self.seeds[0])))
            row["refused"] = next((run["refused"] for run in runs[name] if "refused" in run), None)
            if name in index:
                row |= index[name]
                dense = index.get(DENSE, row)["index"]
                row["delta"] = None if None in (row["index"], dense) else row["index"] - dense
                row["metrics"] = {task: _mean([one[task] for one in scores[name]]) for task in scores[name][0]}
                read = [one["read"] for run in runs[name] for one in run["tasks"].values()]
                row["read"] = None if None in read else statistics.fmean(read)
            if timed is not None and "seconds" in timed:
                system = self.made(Cell(name, pattern, None))
                assert system is not None
                row["subquadratic"] = system.promised().exponent < QUADRATIC
                row["speed"] = efficiency(timed, LINEAR if row["subquadratic"] else QUADRATIC)
            elif timed is not None and row["refused"] is None:
                row["untimed"] = timed["refused"]
            rows.append(row)
        return rows

    def page(self, found: Sequence[dict[str, Any]], command: str, seconds: float) -> Page:
        """Index and efficiency length first, then the metrics and who was refused."""
        told = self.summary(found)
        rows = sorted(told["rows"], key=lambda r: (PATTERNS.index(r["pattern"]), -_number(r["index"]), r["system"]))
        here = [row for row in rows if row["refused"] is None]
        intro = (
            "After Comprehensive Attention Benchmark (arXiv:2210.07661): every system that can have a pattern of"
            f" attention is trained on the pattern's tasks, {len(self.seeds)} seeds and {self.training.steps} steps"
            f" each at {self.training.length} tokens, in the same backbone and on the same data; and one layer of it is"
            " timed. A system that only reads a part of what it could has a budget that is small against that length."
        )
        first, second = _tables(here, max(self.lengths))
        parts: list[dict[str, str] | Table] = [first, figure(here, self.patterns), second, _metric_table(here)]
        refused = [[row["system"], row["pattern"], row["refused"]] for row in rows if row["refused"] is not None]
        refused += [[row["system"], row["pattern"], f"time: {row['untimed']}"] for row in rows if "untimed" in row]
        refused += [[name, "all four", why] for name, why in told["left_out"].items()]
        parts.append(Table("Not compared", ("system", "pattern", "why"), refused))
        if told["correlation"]:
            pairs = [[c["one"], c["other"], c["r"], c["systems"]] for c in told["correlation"]]
            words = "Pearson's, over the systems that have an index in both."
            parts.append(Table("Correlation of the patterns", ("one", "other", "r", "systems"), pairs, words))
        return Page("Four patterns of attention", intro, parts, command, seconds)


class Eager(nn.Module):
    """Softmax attention that makes the whole matrix: the vanilla attention of CAB's own measurements."""

    def __init__(self, causal: bool):
        super().__init__()
        self.causal = causal

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """``[B, H, N, D]``."""
        scores = q @ k.mT * q.shape[-1] ** -0.5
        if self.causal:
            scores = scores + torch.full(scores.shape[-2:], -math.inf).triu(1)
        return scores.softmax(-1) @ v


def no_layer(kind: type[System]) -> str | None:
    """Why a system is in no pattern at all, if it is not."""
    if issubclass(kind, StudySystem):
        return "it is a study"
    if issubclass(kind, CacheSystem):
        return "it decides what a cache keeps and is no attention of its own"
    if issubclass(kind, MethodSystem):
        return "it is done to a finished model and is no layer to train"
    if kind.build is System.build and not hasattr(kind, "layer"):
        return "it defines no attention that a layer could have"
    if needed := [name for name, default in kind.settings().items() if default is inspect.Parameter.empty]:
        return f"its settings {', '.join(needed)} have no defaults"
    return None


def layer_of(system: System | None, causal: bool, width: int, heads: int) -> nn.Module:
    """A layer of attention, as the backbones make it, always with the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Place(width, heads, 0, 1, None, None).filled(mechanism(system, causal)).eval()


@torch.no_grad()
def refusal(system: System | None, pattern: str, training: Training) -> str | None:
    """Why a system does not have a pattern, or ``None``: what it promises, and then CAB's own tests of a fresh layer.

    Source of the tests: scripts/attention_pattern/test_available_pattern_for_attention.py of the official code, and
    that what lies later (or far away in another sequence) is read at all where the pattern is to read it.
    """
    causal, crosses = pattern == "causal self", pattern.endswith("cross")
    if system is not None:
        promised = system.promised()
        if causal and not promised.causal:
            return "it does not promise to be causal"
        if crosses and not promised.cross:
            return "it does not promise to attend to another sequence"
    layer, rng = layer_of(system, causal, training.width, training.heads), torch.Generator().manual_seed(0)
    x, y, z = torch.randn(3, 2, training.length, training.width, generator=rng).unbind(0)
    half = training.length // 2
    if causal:
        whole = layer(x)
        moved = any(_moves(layer(x[:, :cut]), whole[:, :cut]) for cut in (half, training.length - 1))
        return "what an earlier token gets changes with later ones" if moved else None
    if not crosses:
        return None if _looks_ahead(layer, x, y, half) else "it never reads what lies later"
    far = y.clone()
    far[:, -(half // 2) :] = z[:, -(half // 2) :]
    whole = layer(x[:, :half], y)
    if not _moves(layer(x[:, :half], far), whole):
        return "no query reads the last quarter of the other sequence"
    if pattern == "causal cross" and any(_moves(layer(x[:, :n], y), whole[:, :n]) for n in (1, half // 2, half - 1)):
        return "what a query gets changes with later queries"
    return None


def _looks_ahead(layer: nn.Module, x: Tensor, other: Tensor, half: int) -> bool:
    """Does a token of the first half get anything from the second? (Its values, where the layer tells them apart:
    some choose keys by later queries and yet read none of later keys.)"""  # fmt: skip
    if isinstance(layer, MultiHead):
        q, k, v = layer.placed(x)
        changed = torch.cat([v[:, :, :half], layer.placed(other)[2][:, :, half:]], 2)
        return _moves(layer.attend(q, k, v)[:, :, :half], layer.attend(q, k, changed)[:, :, :half])
    return _moves(layer(x)[:, :half], layer(torch.cat([x[:, :half], other[:, half:]], 1))[:, :half])


def _moves(a: Tensor, b: Tensor) -> bool:
    """Do they differ by more than float32 rounding? Raises: SpecError where one is not finite."""
    if not (a.isfinite().all() and b.isfinite().all()):
        raise SpecError("a fresh layer gives what is not finite")
    return float((a - b).abs().max()) > 1e-4 * float(b.abs().max())


def composite(scores: Mapping[str, Sequence[Scores]]) -> dict[str, dict[str, Any]]:
    """CAB's composite index of every system of one pattern, from its scores (one for each seed).

        index of a task = mean over its metrics of sign * (x - mean) / deviation;   index = mean over the tasks

    Mean and (sample) deviation go over the systems, dense among them; ``sign`` makes high good. A system that has a
    score that is not finite has no index, and does not count for the others. Where all are alike a metric tells
    nothing, and is 0.

    Returns:
        By system: ``index``, its standard ``error`` over the seeds (``None`` with one), ``tasks``: the index of each.
    """
    means = {name: {t: _mean([one[t] for one in each]) for t in each[0]} for name, each in scores.items()}
    sound = [one for one in means.values() if all(map(math.isfinite, _flat(one)))]
    scales = {
        (task, metric): (statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0)
        for task, metrics in (sound[0] if sound else {}).items()
        for metric in metrics
        for values in [[one[task][metric] for one in sound]]
    }

    def indices(one: Scores) -> dict[str, float]:
        def standing(task: str, metric: str) -> float:
            middle, deviation = scales[task, metric]
            return TASKS[task].metrics[metric] * (one[task][metric] - middle) / deviation if deviation else 0.0

        return {task: statistics.fmean(standing(task, metric) for metric in metrics) for task, metrics in one.items()}

    found: dict[str, dict[str, Any]] = {}
    for name, each in scores.items():
        if not all(map(math.isfinite, _flat(means[name]))):
            found[name] = {"index": None, "error": None, "tasks": None}
            continue
        tasks = indices(means[name])
        seeds = [statistics.fmean(indices(one).values()) for one in each]
        error = statistics.stdev(seeds) / len(seeds) ** 0.5 if len(seeds) > 1 else None
        found[name] = {"index": statistics.fmean(tasks.values()), "error": error, "tasks": tasks}
    return found


def efficiency(timed: Mapping[str, Any], degree: int) -> dict[str, Any]:
    """Efficiency lengths in time and memory against each reference; ``first``: the first length at which it was won.

    ``degree``: of the mechanism's own curve. As in CAB the shortest length is left out of its curve of times.
    """
    found: dict[str, Any] = {}
    for what in ("seconds", "bytes"):
        for reference in REFERENCES:
            against, own = timed[what][reference], timed[what]["system"]
            skip = 1 if what == "seconds" and len(own) > degree + 1 else 0
            cut = crossing(timed["lengths"], against, own, degree, skip)
            won = [n for n, a, b in zip(timed["lengths"], against, own, strict=False) if b < a]
            found[f"{what}_{reference}"] = cut | {"first": won[0] if won else None}
    return found


def crossing(
    lengths: Sequence[int], reference: Sequence[float], own: Sequence[float], degree: int, skip: int = 0
) -> dict[str, float | None]:
    """The length from which on a mechanism costs less: where its curve leaves that of quadratic attention for good.

    Curves are least squares, of the second degree for the reference (which may have been measured at the first lengths
    only) and of ``degree`` for the mechanism without its first ``skip`` lengths (CAB: 1, and 0 for memory). Source:
    scripts/efficiency_length/efficiency_length.py of the official code.

    Returns:
        ``length`` (0: always less; ``None``: never), and ``r2``, the share of the own variance that its curve explains.
    """
    against = np.polynomial.Polynomial.fit(lengths[: len(reference)], reference, QUADRATIC).convert()
    curve = np.polynomial.Polynomial.fit(lengths[skip:], own[skip:], degree).convert()
    left = np.sum((curve(np.array(lengths[skip:])) - own[skip:]) ** 2)
    total = np.sum((np.array(own[skip:]) - np.mean(own[skip:])) ** 2)
    r2 = float(1 - left / total) if total > 0 else 1.0
    gap = against - curve
    if gap.coef[-1] <= 0:
        return {"length": None, "r2": r2}
    roots: list[float] = [
        float(root.real) for root in gap.roots() if abs(root.imag) < 1e-9 * max(1.0, float(abs(root)))
    ]
    return {"length": max(roots, default=0.0), "r2": r2}


def correlations(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Pearson's correlation of the index in two patterns, where three systems or more have both."""
    index: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["index"] is not None:
            index.setdefault(row["pattern"], {})[row["system"]] = row["index"]
    found = []
    for one, other in combinations(index, 2):
        both = sorted(set(index[one]) & set(index[other]))
        a, b = [index[one][name] for name in both], [index[other][name] for name in both]
        if len(both) > 2 and min(statistics.pstdev(a), statistics.pstdev(b)) > 0:
            found.append({"one": one, "other": other, "r": statistics.correlation(a, b), "systems": len(both)})
    return found


def figure(rows: Sequence[Mapping[str, Any]], patterns: Sequence[str]) -> dict[str, str]:
    """The index of every system in each pattern, with its standard error."""
    drawn, axes = plots.figure((len(patterns) + 1) // 2, 2)
    for axis, pattern in zip(axes, patterns, strict=False):
        here = [row for row in rows if row["pattern"] == pattern and row["index"] is not None][::-1]
        places = range(len(here))
        axis.errorbar(
            [row["index"] for row in here], places, xerr=[row["error"] or 0.0 for row in here], fmt="o",
            color=plots.COLORS[0], label="composite index and its standard error over the seeds",
        )  # fmt: skip
        axis.set_yticks(list(places), [row["system"] for row in here])
        axis.set_title(pattern)
        axis.axvline(0, lw=0.8, ls=":", color=plots.INK)
    for axis in axes[len(patterns) :]:
        axis.set_visible(False)
    best = {row["pattern"]: row["system"] for row in reversed(rows) if row["index"] is not None}
    words = "The greatest index: " + "; ".join(f"{pattern}: {name}" for pattern, name in best.items()) + "."
    return plots.svg(drawn, axes[0], "Composite index by pattern", words)


def _tables(rows: Sequence[Mapping[str, Any]], longest: int) -> list[Table]:
    def cost(row: Mapping[str, Any], *names: str) -> list[Any]:
        if "speed" not in row:
            return [None] * len(names)
        return [_told(row["speed"][name]["length"], longest) for name in names]

    first = Table(
        "Composite index and efficiency length",
        ("system", "in", "index", "error", "to dense", "read", "time", "memory"),
        [
            [row["system"], SHORT[row["pattern"]], row["index"], row.get("error"), row.get("delta"), row.get("read")]
            + cost(row, "seconds_eager", "bytes_eager")
            for row in rows
        ],
        "in: noncausal (N) or causal (C), self (S) or cross (C). index: mean over tasks and metrics of the deviation"
        " from the mean of all systems here, in standard deviations, high is good; error: its standard error over the"
        " seeds; to dense: the index less that of dense; read: share of the places of the matrix with a weight that is"
        " not 0. time, memory: the efficiency length, from which on a layer with the system's default settings costs"
        " less than one with softmax attention that makes the whole matrix, by curves fitted to what was measured (a"
        f" parabola; a line where less than N^2 is promised); ~ is beyond the {longest:,} tokens that were measured.",
    )
    columns = ("seconds_eager", "bytes_eager", "seconds_dense", "bytes_dense")
    second = Table(
        "Efficiency length",
        ("system", "in", *(f"{a}, {b}" for b in REFERENCES for a in ("time", "memory")), "first", "R2", "settings"),
        [
            [row["system"], SHORT[row["pattern"]], *cost(row, *columns)]
            + [row["speed"]["seconds_dense"]["first"], row["speed"]["seconds_dense"]["r2"], row["settings"]]
            for row in rows
            if "speed" in row
        ],
        f"eager: against softmax attention that makes the whole matrix, as CAB's vanilla does (measured to {EAGER:,}"
        " tokens, then by its parabola). dense: against this engine's dense attention, which does not. first: the"
        " first measured length with less time than dense; R2: of the system's own curve of times. settings: of the"
        " trainings.",
    )
    return [first, second]


def _told(length: float | None, longest: int) -> str | int:
    if length is None:
        return "never"
    return "always" if length == 0 else f"~{length:,.0f}" if length > longest else round(length)


def _metric_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    told = [
        [row["system"], row["pattern"], task, metric, value, "high" if TASKS[task].metrics[metric] > 0 else "low"]
        for row in rows
        for task, metrics in row.get("metrics", {}).items()
        for metric, value in metrics.items()
    ]
    words = "Means over the seeds. " + " ".join(f"{task.name} stands for {task.after}." for task in TASKS.values())
    return Table("Metrics", ("system", "pattern", "task", "metric", "value", "good"), told, words)


def _said(system: System | None) -> str:
    """A system with its settings; where a function lies in memory is no setting."""
    return "plain softmax" if system is None else re.sub(r" at 0x[0-9a-f]+", "", repr(system))


def _metrics(task: str, one: Mapping[str, float]) -> dict[str, float]:
    return {metric: one[metric] for metric in TASKS[task].metrics}


def _mean(each: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {metric: statistics.fmean(one[metric] for one in each) for metric in each[0]}


def _flat(scores: Scores) -> list[float]:
    return [value for metrics in scores.values() for value in metrics.values()]


def _number(value: float | None) -> float:
    return -math.inf if value is None else value


@cache
def sources() -> str:
    """A hash of the sources that compute and measure, as they were when this process began to run them."""
    here = Path(__file__).parent
    files = [*here.parent.glob("core/**/*.py"), *here.parent.glob("nn/*.py"), *here.glob("cab*.py")]
    files += [here / "claims.py", here / "measure.py", *here.parent.glob("systems/*/_[!_]*.py")]
    return cells.sources(*files)
