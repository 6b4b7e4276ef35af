"""The Sparse Frontier: how sparse attention may be, by unit, budget, phase, length and model size, at what accuracy.

The paper takes finished models, reads the context (prefill) or generates (decode) with training-free sparse attention,
and asks on each task which sparsity is sure to lose nothing that matters, and whether a larger sparse model is better
than a smaller dense one for the same operations. This study asks the same of the zoo's models:

    unit        blocks, vertical-slash, token (:mod:`saccade.study.frontier` says how each is chosen)
    budget      ``sparsities``; the same for all rows, heads and layers
    phase       prefill (answers are read densely) and decode (the context is)
    safe        with ``confidence`` fewer than ``tolerance`` of dense attention's right answers are lost

Paper: The Sparse Frontier: Sparse Attention Trade-offs in Transformer LLMs, arXiv:2504.17768
Code: https://github.com/PiotrNawrot/sparse-frontier (modelling/attention/efficient_prefilling.py: blocks of 16 keys,
    the first, own and former forced, their number solved for a sparsity; as many verticals as slashes;
    efficient_decoding.py: pages of 16, the own forced, bounds summed over a group of heads; 100 samples)

Differs: byte models of up to 2.7 million parameters and 2048 tokens of synthetic recall, not Qwen 2.5 7B to 72B and
128k tokens of nine tasks. What the code forces for 16k tokens and more (4 keys, 64 distances) is one of each. The slash
of a block of queries is 16 wide, not 64. In decode the verticals and slashes of the context stand for SnapKV's
eviction; single keys, chosen by their true scores, are a bound that the paper does not run. The code holds no
statistics, and the paper's own test could not be read for this file: here losses are bounded page by page and tested in
a fixed sequence (Learn then Test, arXiv:2110.01052), at a tolerance of 5 points. Scaling laws are not fitted: three
sizes are too few. The last query of the prompt counts as the first of the decoding, since it finds the answer. Single
keys are run only if asked for. Of a default run the half at 256 tokens took six minutes of one core, and a cell at 1024
takes about one (``--ray local`` spreads them); it goes on where it was interrupted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from ..base import ClaimNumbers, StudySystem

if TYPE_CHECKING:
    from ...study.cells import Comparison

MODERATE = 0.8  # the paper's "even moderate sparsity levels"
CLAIM: dict[str, Any] = {
    "models": ("lm",), "tasks": ("needle", "recall", "copy"), "lengths": (512,), "sparsities": (0.5, 0.8, 0.95),
    "units": ("blocks", "vertical-slash"), "count": 30, "tolerance": 0.1,
}  # fmt: skip


class SparseFrontier(StudySystem):
    """Settings: ``models`` (zoo names or directories), ``tasks``, ``lengths``, ``sparsities``, ``phases``, ``units``;
    ``count`` pages of each task and length; ``tolerance`` and ``confidence`` of what is called safe; ``seed``.
    """

    slug = "sparse-frontier"
    title = "The Sparse Frontier"
    paper = "https://arxiv.org/abs/2504.17768"
    code = "https://github.com/PiotrNawrot/sparse-frontier"
    small: ClassVar[dict[str, Any]] = {
        "models": ("lm",), "tasks": ("needle", "lookup"), "lengths": (256,), "sparsities": (0.5, 0.9), "count": 6,
        "tolerance": 0.5,
    }  # fmt: skip

    def __init__(
        self,
        models: tuple[str, ...] = ("lm", "lm-small", "lm-tiny"),
        tasks: tuple[str, ...] = ("needle", "lookup", "recall", "copy", "tracking"),
        lengths: tuple[int, ...] = (256, 1024),
        sparsities: tuple[float, ...] = (0.5, 0.8, 0.95),
        phases: tuple[str, ...] = ("prefill", "decode"),
        units: tuple[str, ...] = ("blocks", "vertical-slash"),
        count: int = 100,
        tolerance: float = 0.05,
        confidence: float = 0.95,
        seed: int = 0,
    ):
        self.models, self.tasks, self.lengths, self.sparsities = models, tasks, lengths, sparsities
        self.phases, self.units = phases, units
        self.count, self.tolerance, self.confidence, self.seed = count, tolerance, confidence, seed

    def comparison(self) -> Comparison:
        """A cell for each model, task, length, phase and unit."""
        from ...study.frontier import Frontier

        return Frontier(**{name: getattr(self, name) for name in self.settings()})

    def claim(self) -> ClaimNumbers:
        """The embedded model on three tasks, by the units that the paper runs; sizes are left to the whole study."""
        from ...study import cells
        from ...study.frontier import Frontier

        job = Frontier(**CLAIM)
        found = [{"result": result} for _, result, _ in cells.in_turn(job, job.cells)]
        told = job.summary(found)
        safe, curves = told["safe"], told["curves"]
        best = {
            (task, phase): max(row["sparsity"] for row in safe if (row["task"], row["phase"]) == (task, phase))
            for task in job.tasks
            for phase in job.phases
        }
        first = {
            unit: sum(row["sparsity"] == best[row["task"], row["phase"]] for row in safe if row["unit"] == unit)
            for unit in job.units
        }
        tests = [row for row in curves if 0 < row["wanted"] <= MODERATE]
        worse = [row for row in tests if row["p_worse"] <= (1 - job.confidence) / len(tests)]
        hurt = sorted({row["task"] for row in worse})
        means = told["mean_safe"]
        return ClaimNumbers.decide(
            {
                "mean_safe": means, "first": first, "worse_by_moderate_sparsity": hurt,
                "safe": {f"{r['task']}, {r['phase']}, {r['unit']}": r["sparsity"] for r in safe},
                "not_measured": told["not_measured"],
            },
            f"On {job.count} pages of {job.lengths[0]} bytes of each of {', '.join(job.tasks)}, the highest sparsity"
            f" that is safe (at {job.confidence:.0%} confidence less than {job.tolerance:.0%} lost) is"
            f" {means['decode']:.0%} when decoding and {means['prefill']:.0%} when prefilling on average."
            f" Of {len(best)} pairs of task and phase"
            f" {', '.join(f'{unit} has the highest in {count}' for unit, count in first.items())}. Sparsities up to"
            f" {MODERATE:.0%} make {', '.join(hurt) or 'no task'} significantly worse.",
            decoding_bears_more_than_prefilling=means["decode"] > means["prefill"],
            no_unit_is_best_everywhere=max(first.values()) < len(best),
            moderate_sparsity_hurts_a_task=bool(hurt),
            every_task_measured=not told["not_measured"],
        )  # fmt: skip
