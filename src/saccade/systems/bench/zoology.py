"""Zoology: how wide must a model be to recall? Accuracy on multi-query associative recall over width and length.

    solved width    of a mixer and a length N: the least width at which a two-layer model answers 90 % of the questions
    gap closed      (accuracy - base-conv's) / (attention's - base-conv's), of means over lengths and widths

The paper's findings: attention solves the task at a small width, whatever N; gated convolutions, which read by a
filter that does not depend on the input, need a width that grows with N; hybrids in which some tokens attend, chosen
by the input, close the gap. :mod:`saccade.study.zoology` holds the mixers and says what each computes.

Paper: Zoology: Measuring and Improving Recall in Efficient Language Models, arXiv:2312.04927
Code: https://github.com/HazyResearch/zoology (zoology/experiments/paper_configs/iclr24_zoology_figure2/configs.py;
    zoology/model.py, train.py; zoology/mixers/attention.py, base_conv.py, convolution.py, based.py, selective.py)

Differs: widths 16 to 128 and lengths 64 to 256, in the paper 64 to 512 each (a pair to 16 tokens up to 256, as there);
a vocabulary of 1024, there 8192; 20,000 examples in batches of 64 for 32 epochs, there 100,000 in batches of 512 (256
at length 256) for 64; the two greater of the four learning rates there: every size is a setting. What is reported is
the last accuracy (a training stops above 99 %, as there) of the best learning rate, chosen on the test examples as
there. Learned selection is the official ``SigmoidLookups``, whose choice of the greatest at test time looks at the
whole text; no official config trains it on this task: here it follows a layer of BaseConv, as Based does there. The
repository holds no programmatic selection: here a token attends if it occurred before. Hyena, RWKV, H3 and Mamba are
not compared. Official layers without a perceptron still add the norm of the stream to the stream; so do these. The
claim is smaller yet (16 and 32 tokens, a pair to 4 of them, a vocabulary of 64; 48 epochs, since attention has not
begun to recall after 32) and leaves learned selection to the study: of 8 questions in 32 tokens its ceil(sqrt(N))
tokens can reach 6.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from ..base import ClaimNumbers, StudySystem

if TYPE_CHECKING:
    from ...study.zoology import Point, Zoology

HYBRID = "programmatic"
CLOSED = 0.9  # of the gap at the greatest length, by the better hybrid; the paper: 97.4 % of that of perplexity
SMALL, WIDE = 32, 64
CLAIM: dict[str, Any] = {
    "lengths": (16, 32), "lrs": (1e-2,), "vocab": 64, "examples": 6400, "epochs": 48, "test": 128, "tokens_per_pair": 4,
}  # fmt: skip


class ZoologyRecall(StudySystem):
    """Settings: ``mixers``, ``lengths``, ``widths``, ``lrs``, ``seeds``; of each training ``vocab``, ``examples``,
    ``epochs``, ``batch``, ``test`` (held-out examples) and ``tokens_per_pair``.

    The default run is 120 trainings: some 15 hours of one core, by the time of single steps; it was not run whole.
    """  # fmt: skip

    slug = "zoology"
    title = "Zoology: recall over width"
    paper = "https://arxiv.org/abs/2312.04927"
    code = "https://github.com/HazyResearch/zoology"
    small: ClassVar[dict[str, Any]] = {
        "mixers": ("attention", "base-conv", "programmatic"), "lengths": (16, 32), "widths": (8, 16), "lrs": (1e-2,),
        "vocab": 64, "examples": 64, "epochs": 2, "batch": 16, "test": 16, "tokens_per_pair": 8,
    }  # fmt: skip

    def __init__(
        self,
        mixers: tuple[str, ...] = ("attention", "base-conv", "based", "learned", "programmatic"),
        lengths: tuple[int, ...] = (64, 128, 256),
        widths: tuple[int, ...] = (16, 32, 64, 128),
        lrs: tuple[float, ...] = (2.15e-3, 1e-2),
        seeds: tuple[int, ...] = (0,),
        vocab: int = 1024,
        examples: int = 20_000,
        epochs: int = 32,
        batch: int = 64,
        test: int = 256,
        tokens_per_pair: int = 16,
    ):
        self.mixers, self.lengths, self.widths, self.lrs, self.seeds = mixers, lengths, widths, lrs, seeds
        self.vocab, self.examples, self.epochs, self.batch = vocab, examples, epochs, batch
        self.test, self.tokens_per_pair = test, tokens_per_pair

    def comparison(self) -> Zoology:
        """A cell for each mixer, length, width, learning rate and seed."""
        from ...study.zoology import Training, Zoology

        training = Training(self.vocab, self.examples, self.epochs, self.batch, self.test, self.tokens_per_pair)
        return Zoology(self.mixers, self.lengths, self.widths, self.lrs, self.seeds, training)

    def claim(self) -> ClaimNumbers:
        """Attention and a hybrid at a small width, the gated convolution at that and at twice of it; two lengths."""
        from ...study import cells

        points = []
        for mixers, widths in ((("attention", HYBRID), (SMALL,)), (("base-conv",), (SMALL, WIDE))):
            job = ZoologyRecall(mixers=mixers, widths=widths, **CLAIM).comparison()
            points += job.points([{"result": result} for _, result, _ in cells.in_turn(job, job.cells)])
        return judged(points)


def judged(points: Sequence[Point]) -> ClaimNumbers:
    """The paper's three findings on the points of :meth:`ZoologyRecall.claim`."""
    from ...study.zoology import SOLVED, gap_closed, solved

    short, long = (limit(point.length for point in points) for limit in (min, max))
    needed = {m: [solved(points, m, n) for n in (short, long)] for m in ("attention", "base-conv", HYBRID)}
    first, last = (math.inf if width is None else width for width in needed["base-conv"])
    gap = gap_closed([point for point in points if (point.length, point.width) == (long, SMALL)])
    told = {f"{p.mixer}, N = {p.length}, width {p.width}": round(p.accuracy, 3) for p in points}
    closed = {mixer: round(share, 3) for mixer, share in gap.items()}
    return ClaimNumbers.decide(
        {"accuracy": told, "solved_width": needed, "gap_closed": closed},
        f"Accuracy with two layers: {', '.join(f'{name}: {share:.1%}' for name, share in told.items())}. A width solves"
        f" a length from {SOLVED:.0%} on. Of the gap between the gated convolution and attention (N = {long}, width"
        f" {SMALL}) {' and '.join(f'{mixer} selection closes {share:.0%}' for mixer, share in closed.items())}.",
        attention_solves_both_lengths_at_the_small_width=needed["attention"] == [SMALL, SMALL],
        gated_convolution_needs_more_width_at_the_greater_length=first < last,
        gated_convolution_needs_more_width_than_attention=last > SMALL,
        a_hybrid_closes_the_gap=max(gap.values(), default=0.0) >= CLOSED,
    )
