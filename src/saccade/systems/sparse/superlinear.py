"""Superlinear attention: search about sqrt(N) anchors behind each query, attend within a span around the best of them.

    anchors of the query at p:  a = p + 1 - floor(i ** (1 / power)),  i = near + 1, near + 2, ...  while a >= 0
    the ``spans`` best by s[p, a], each its span:  a - ceil(backward * (p + 1) ** power) ... a + ceil(forward * ditto)
    w[p] = sum over spans of  softmax(s[p, a] over the chosen a) * softmax(s[p] over the span and the window)

with ``s = q . k / sqrt(D)`` and a window of the last ``(near + 1) ** (1 / power) - 1`` keys, in which the spans never
reach. The gate, a softmax of the anchors' own scores, is what trains the search. Anchors lie no further apart than a
span is long (at ``backward=2`` or more), so no key is out of reach; both steps cost N ** 1.5 at ``power=0.5``.

Paper: Superlinear Multi-Step Attention, arXiv:2601.18401
Code: https://github.com/concavity-ai/superlinear (superlinear/kernels/superlinear/search/_reference.py: get_spans,
    kernels/common/adjustment.py, kernels/superlinear/attention/_prefill.py; read in the package superlinear 0.1.0)

Differs: one query searches and attends; the paper projects a second one from the hidden state, which a program on q, k
and v does not have. This is the official function called with ``Q1 = Q2 / sqrt(D)`` (its search takes no root). Its two
powers, of the anchors and of the spans, are one setting, and roots are taken in float64. Positions count from the first
key, so padding on the left shortens no span. ``near=3, backward=3, forward=1`` are the package's example; its functions
default to 0, 2 and 0, the released model has 65, 3 and 1 with powers of 0.55.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...core import masks
from ...core.normalizers import HIDDEN, Normalizer, Softmax
from ...core.spec import Attention
from ...core.tile import At
from ..base import ClaimNumbers, Promises, System
from ._span_search import SpanSearch

LENGTH = 16_384  # positions from which every earlier key must be in reach
SIZES = (2048, 8192)  # between which the exponent of the operations is measured
KEPT = 0.9  # share of the needles that must still be found
EXPONENT = 1.5  # the paper's; what is measured may exceed it by as much as the law on operations allows


class Spans(Normalizer):
    """The definition: from a row of scores, its best anchors, their spans, and the gated sum of softmaxes."""

    unit_rows = True

    def __init__(self, count: int, near: int, backward: float, forward: float, power: float):
        super().__init__()
        self.count, self.near, self.before, self.after, self.power = count, near, backward, forward, power
        self.window = math.floor((near + 1) ** (1 / power)) - 1

    def stripes(self, length: int, device: torch.device) -> Tensor:
        """How far behind a query its anchors lie, int64, those below ``length``; ascending."""
        most = math.ceil(length**self.power) + 1
        index = torch.arange(self.near + 1, max(most, self.near + 1) + 1, device=device)
        behind = (index.double() ** (1 / self.power)).floor().long() - 1
        return behind[behind < length]

    def bounds(self, row: Tensor, anchor: Tensor) -> tuple[Tensor, Tensor]:
        """First and last key of the spans around anchors, of queries at ``row``."""
        scale = (row + 1).double() ** self.power
        start = anchor - (self.before * scale).ceil().long()
        end = anchor + (self.after * scale).ceil().long()
        return start.clamp(min=0), torch.minimum(end, row - self.window)

    def forward(self, scores: Tensor, at: At) -> Tensor:
        stripe = torch.zeros(at.m + at.n, dtype=torch.bool, device=scores.device)
        stripe[self.stripes(len(stripe), scores.device)] = True
        seen = (at.distance >= 0) & stripe[at.distance.clamp(0, len(stripe) - 1)]
        best, place = scores.masked_fill(~seen, HIDDEN).topk(min(self.count, scores.shape[-1]), -1)
        anchor = at.k.expand(scores.shape).gather(-1, place)
        start, end = self.bounds(at.row, anchor)
        found = best > HIDDEN
        end = torch.where(found, end, -1)
        gate = best.masked_fill(~found, torch.finfo(best.dtype).min).softmax(-1)  # none found: the window alone
        local = (at.distance >= 0) & (at.distance < self.window)
        weights = torch.zeros_like(scores)
        for i in range(best.shape[-1]):
            inside = (at.k >= start[..., i, None]) & (at.k <= end[..., i, None]) | local
            weights = weights + gate[..., i, None] * Softmax().forward(scores.masked_fill(~inside, HIDDEN), at)
        return weights


class Superlinear(System):
    """Settings: ``spans`` per query; ``near``, the last stripe that is left to the window; ``backward`` and
    ``forward``, extents of a span; ``power`` of the position that counts anchors and scales spans."""

    slug = "superlinear"
    title = "Superlinear multi-step attention"
    paper = "https://arxiv.org/abs/2601.18401"
    code = "https://github.com/concavity-ai/superlinear"
    promises = Promises(cross=False, exponent=1.5, unit_rows=True)

    def __init__(self, spans: int = 3, near: int = 3, backward: float = 3, forward: float = 1, power: float = 0.5):
        self.spans, self.near, self.backward, self.forward, self.power = spans, near, backward, forward, power

    def build(self, heads: int) -> Attention:
        """The normalizer that defines it, and the search that finds the blocks it needs."""
        spans = Spans(self.spans, self.near, self.backward, self.forward, self.power)
        return Attention(mask=masks.Causal(), normalizer=spans, select=SpanSearch(spans))

    def reachable(self, length: int) -> bool:
        """Can every key be chosen, by each of ``length`` queries that sees it?"""
        spans = Spans(self.spans, self.near, self.backward, self.forward, self.power)
        row = torch.arange(length)[:, None]
        anchor = row - spans.stripes(length, row.device)
        start, end = spans.bounds(row, anchor)
        exists = anchor >= 0
        after = torch.cat([row - spans.window + 1, start[:, :-1]], -1)  # where what lies behind has to reach
        whole = ((after <= end + 1) | ~exists).all(-1)
        first = torch.where(exists, start, row - spans.window + 1).amin(-1)
        return bool((whole & (first <= 0)).all())

    def claim(self) -> ClaimNumbers:
        """Reach of every query, exponent of the counted operations, and needles found without any training."""
        from ...study.laws import GROWTH
        from ...study.sparse_claims import needles_kept, operations

        slopes = {}
        for name, spec in (("superlinear", self.build(1)), ("dense", Attention(mask=masks.Causal()))):
            less, more = (operations(spec, n) for n in SIZES)
            slopes[name] = math.log(more / less) / math.log(SIZES[1] / SIZES[0])
        reachable = self.reachable(LENGTH)
        found = needles_kept(lambda layer, heads: self.build(heads), length=512, examples=6)
        return ClaimNumbers.decide(
            {f"exponent_{name}": round(slope, 3) for name, slope in slopes.items()}
            | {"reachable": reachable, "untrained_needles": found},
            f"Each of the first {LENGTH} queries can reach {'every' if reachable else 'not every'} key before it."
            f" Operations grow as N^{slopes['superlinear']:.2f} from N={SIZES[0]} to {SIZES[1]} (dense:"
            f" N^{slopes['dense']:.2f}). Put into a model trained with softmax it finds {found:.0%} of the needles that"
            " the model finds; the paper's needles are found after fine-tuning, which is not measured here.",
            every_key_reachable=reachable,
            exponent=slopes["superlinear"] <= EXPONENT + GROWTH,
            needles_found=found >= KEPT,
        )
