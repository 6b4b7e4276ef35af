"""Comprehensive Attention Benchmark (CAB): every mechanism in each of four attention patterns it can have.

    noncausal self, causal self, noncausal cross, causal cross

    composite index   of a pattern: per metric sign * (x - mean) / deviation over the mechanisms (sample deviation),
                      averaged over the metrics of a task, then over the tasks
    efficiency length where the mechanism's line of time (or memory) over length crosses the parabola of vanilla
                      attention: from there on it costs less

The paper compares nine mechanisms with vanilla attention on seven tasks in eight backbones, and in each replaces only
the attention of the pattern. Its finding: in noncausal self-attention several do as well as vanilla; in cross-attention
none that can do it does (CAB's leaderboards), and few can.

Paper: CAB: Comprehensive Attention Benchmarking on Long Sequence Modeling, arXiv:2210.07661
Code: https://github.com/Shark-NLP/CAB
    (scripts/compositional_index/compositional_index.py, scripts/efficiency_length/efficiency_length.py and
    efficiency_test.py, scripts/attention_pattern/test_available_pattern_for_attention.py)

Differs: small generated tasks stand for the seven real ones, two per pattern, in one backbone
(:mod:`saccade.study.cab_tasks`). The official code carries the mean and deviation of the paper's own mechanisms; here
they are of the mechanisms that are compared, dense among them. CAB's only statistics are means; here each index has
its standard error over the seeds. Efficiency lengths are told for each pattern, in CAB for noncausal self alone;
against vanilla attention that makes the whole matrix, as there, and against today's dense attention; times are
medians of rounds that alternate with the reference, there means between the quartiles; a mechanism that promises no
less than N^2 gets a parabola, not a line. CAB gives a mechanism one small budget (16 landmarks, windows of 16)
everywhere; here ``budgets`` are those of the trainings, which are short, and what is timed has its default settings.
Whether a mechanism has a pattern is asked of its promises and then measured, by CAB's tests and one more: that it
reads what lies later (or far away in the other sequence) where the pattern is to read it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ..base import ClaimNumbers, StudySystem

if TYPE_CHECKING:
    from ...study.cab import Cab

PATTERNS = ("noncausal self", "causal self", "noncausal cross", "causal cross")
BUDGETS: Mapping[str, Mapping[str, Any]] = {  # of those whose default reads everything, or nothing, at 64 tokens
    "hip": {"keep": 16, "rows": 8, "columns": 2, "window": 16},
    "landmark": {"block": 7},
    "moa-spans": {"block": 8, "length": 64},
    "moba": {"block": 8, "keep": 3, "rows": 8},
    "powerattention": {"block": 4, "window": 1},
    "routing-transformer": {"clusters": 4, "window": 16},
    "s2": {"block": 8, "local": 2},
    "sigmoid": {"length": 64},
}
CLAIMED: dict[str, Any] = {
    "systems": ("cog", "powerattention", "sigmoid"), "seeds": (0,), "steps": 120,
    "length": 32, "width": 32, "budgets": {**BUDGETS, "sigmoid": {"length": 32}},
    "lengths": (256, 512, 1024, 2048), "rounds": 1,
}  # fmt: skip


class ComprehensiveAttentionBenchmark(StudySystem):
    """Settings: ``systems`` (slugs; all if not given), ``patterns``; of the trainings ``seeds``, ``steps``, ``length``,
    ``width`` and ``budgets``, settings by slug; of the timing ``lengths`` and ``rounds``.

    The default run takes hours (about 20 s of one core for a training cell of plain attention, twice that where the
    engine's band trains), and goes on where it was stopped.
    """  # fmt: skip

    slug = "cab"
    title = "CAB: four patterns of attention"
    paper = "https://arxiv.org/abs/2210.07661"
    code = "https://github.com/Shark-NLP/CAB"
    small: ClassVar[dict[str, Any]] = {
        "systems": ("sigmoid", "moba"), "seeds": (0, 1), "steps": 3, "length": 16, "width": 16,
        "budgets": {"moba": {"block": 4, "keep": 2, "rows": 4}}, "lengths": (32, 64, 128), "rounds": 1,
    }  # fmt: skip

    def __init__(
        self, systems: tuple[str, ...] | None = None, patterns: tuple[str, ...] = PATTERNS,
        seeds: tuple[int, ...] = (0, 1, 2), steps: int = 300, length: int = 64, width: int = 64,
        budgets: Mapping[str, Mapping[str, Any]] = BUDGETS,
        lengths: tuple[int, ...] = (256, 512, 1024, 2048, 4096, 8192, 16384), rounds: int = 3,
    ):  # fmt: skip
        self.systems, self.patterns, self.seeds, self.steps = systems, patterns, seeds, steps
        self.length, self.width, self.budgets, self.lengths, self.rounds = length, width, budgets, lengths, rounds

    def comparison(self) -> Cab:
        """The cells of these settings."""
        from ...study.cab import Cab
        from ...study.cab_tasks import Training

        training = Training(length=self.length, width=self.width, steps=self.steps)
        return Cab(self.systems, self.patterns, self.budgets, self.seeds, training, self.lengths, self.rounds)

    def claim(self) -> ClaimNumbers:
        """A small run: does every system get its row, and does vanilla attention lead where it leads in the paper?"""
        from ...study import cells

        job = type(self)(**CLAIMED).comparison()
        with tempfile.TemporaryDirectory() as folder:
            return judged(job.summary(cells.run(job, Path(folder)))["rows"])


def judged(rows: Sequence[Mapping[str, Any]]) -> ClaimNumbers:
    """The claim, from the rows of a run."""
    here = {pattern: {r["system"]: r["index"] for r in rows if r["pattern"] == pattern} for pattern in PATTERNS}
    index = {pattern: {n: x for n, x in found.items() if x is not None} for pattern, found in here.items()}
    broken = [r for r in rows if r["index"] is None and not (r["refused"] and not r["refused"].startswith("it fails"))]
    under = [r["speed"] for r in rows if r.get("subquadratic")]
    lengths = [s[f"{what}_eager"]["length"] for s in under for what in ("seconds", "bytes")]
    best = {pattern: max(found, key=lambda name: found[name]) for pattern, found in index.items()}
    told = ", ".join("never" if n is None else f"{n:.0f}" for n in lengths)
    return ClaimNumbers.decide(
        {
            "index": {p: {n: round(x, 3) for n, x in found.items()} for p, found in index.items()},
            "dense": {task: metrics for r in rows if r["system"] == "dense" for task, metrics in r["metrics"].items()},
            "refused": {f"{r['system']}, {r['pattern']}": r["refused"] for r in rows if r["refused"]},
            "efficiency_lengths": {
                f"{r['system']}, {r['pattern']}": {name: s["length"] for name, s in r["speed"].items()}
                for r in rows
                if "speed" in r
            },
        },
        f"{sum(map(len, index.values()))} indices of {len(rows)} rows, the other systems refused with the reason."
        f" The best: {', '.join(f'{pattern}: {name}' for pattern, name in best.items())}. Efficiency lengths (time"
        f" and memory) of what promises less than N^2: {told or 'none'}.",
        every_system_has_its_row=not broken and len(rows) == len(PATTERNS) * (1 + len(CLAIMED["systems"])),
        subquadratic_systems_have_an_efficiency_length=bool(lengths) and None not in lengths,
        something_reaches_vanilla_in_noncausal_self=best[PATTERNS[0]] != "dense",
        vanilla_leads_noncausal_cross=best[PATTERNS[2]] == "dense",
        vanilla_leads_causal_cross=best[PATTERNS[3]] == "dense",
    )
