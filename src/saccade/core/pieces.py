"""A program on a piece of a call: some of the queries, some of the keys, and how the results of pieces are merged.

Parts see the place of a piece's tiles in the whole call, so masks, biases, edits and stats mean the same. Rows are
merged by their log-sum-exp (softmax) or added (what treats each score alone); what needs a whole row is refused.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .edits import Dropout, Edit, Function, Mix, MixHeads, OnHeads, Renormalize, Replace, Scale, Zero
from .errors import Unsupported
from .masks import EMPTY, Full, Mask, Span
from .normalizers import HIDDEN, Identity, Normalizer, ReLU, Sigmoid, Softmax
from .program import Program
from .scores import Score
from .spec import Attention
from .stats import Entropy, KeyMass, LogSumExp, Max, MeanDistance, RegionMass, Stat, TopK
from .strips import Shape
from .tile import At, Tile, per_row

NORMALIZERS = (Softmax, Sigmoid, ReLU, Identity)
OF_SCORES = (LogSumExp, Max)
OF_WEIGHTS = (Entropy, MeanDistance, RegionMass, KeyMass, TopK)
ALONE = (Scale, Zero, Replace, Dropout, Function, MixHeads, Mix)  # look at no other key of the row


@dataclass(frozen=True)
class Place:
    """Where a piece begins, and the sizes of the whole call."""

    q: int
    k: int
    n: int
    m: int
    offset: int
    counted: bool

    def at(self, at: At) -> At:
        """A place of the piece as one of the whole call.

        What is found there is kept for the next part: no part sees the piece's own numbers.
        """
        return at.but(
            q=at.q + self.q, k=at.k + self.k, n=self.n, m=self.m, offset=self.offset, counted=self.counted,
            first=None if at.first is None else at.first + self.k, found=at.found,
        )  # fmt: skip

    def span(self, span: Span) -> Span:
        """Blocks of the piece as blocks of the whole call."""
        return replace(
            span, q_lo=span.q_lo + self.q, q_hi=span.q_hi + self.q, k_lo=span.k_lo + self.k, k_hi=span.k_hi + self.k,
            n=self.n, m=self.m, offset=self.offset,
        )  # fmt: skip

    def sees(self, mask: Mask, shape: Shape) -> bool:
        """May a query of the piece see a key of it? As far as the mask's closed form tells."""
        block = Span.grid(
            shape.n, shape.m, shape.n, shape.m, batch=shape.batch, heads=shape.heads, device=shape.device
        )  # fmt: skip
        return bool((mask.blocks(self.span(block)) > EMPTY).any())


class PlacedMask(Mask):
    """A mask of the whole call, on a piece."""

    def __init__(self, inner: Mask, place: Place):
        super().__init__()
        self.inner: Mask = inner
        self.place = place

    @property
    def by_distance(self) -> bool:  # type: ignore[override]
        return self.inner.by_distance

    def visible(self, at: At) -> Tensor:
        """As the whole call's mask sees it there."""
        return self.inner.visible(self.place.at(at))

    def blocks(self, span: Span) -> Tensor:
        """As the whole call's mask sees them there."""
        return self.inner.blocks(self.place.span(span))


class PlacedScore(Score):
    """A score modifier of the whole call, on a piece."""

    def __init__(self, inner: Score, place: Place):
        super().__init__()
        self.inner: Score = inner
        self.place = place
        self.shift, self.mixes_heads = inner.shift, getattr(inner, "mixes_heads", False)
        self.may_hide = inner.may_hide

    def forward(self, score: Tensor, at: At) -> Tensor:
        return self.inner(score, self.place.at(at))

    def inplace(self, score: Tensor, at: At) -> Tensor:
        return self.inner.inplace(score, self.place.at(at))


class PlacedEdit(Edit):
    """An edit of the whole call, on a piece."""

    def __init__(self, inner: Edit, place: Place):
        super().__init__()
        self.inner: Edit = inner
        self.place = place
        self.linear, self.needs_visible = inner.linear, inner.needs_visible
        self.mixes_heads = getattr(inner, "mixes_heads", False)

    def forward(self, weights: Tensor, at: At, visible: Tensor | None) -> Tensor:
        return self.inner(weights, self.place.at(at), visible)

    def inplace(self, weights: Tensor, at: At, visible: Tensor | None) -> Tensor:
        return self.inner.inplace(weights, self.place.at(at), visible)


class PlacedStat(Stat):
    """A stat of the whole call, on a piece."""

    def __init__(self, inner: Stat, place: Place):
        super().__init__(inner.label, inner.edited)
        self.inner: Stat = inner
        self.place = place
        self.axis, self.needs, self.keys = inner.axis, inner.needs, inner.keys

    def see(self, tile: Tile) -> tuple[Tensor, ...]:
        return self.inner.see(replace(tile, at=self.place.at(tile.at)))

    def widths(self, m: int) -> tuple[tuple[int, ...], ...]:
        return self.inner.widths(m)


class Known(Normalizer):
    """``exp(s - total)``: softmax of the keys that are here, the logarithm of the row's whole sum being known.

    Args:
        total: ``[B, H, n]``; ``inf`` for a row that sees nothing.
        pull: gradient of the total ``[B, H, n]``, which the closed backward hands on to the scores.
    """

    total: Tensor
    pull: Tensor | None

    def __init__(self, total: Tensor, pull: Tensor | None = None):
        super().__init__()
        self.hold("total", total)
        self.hold("pull", pull)

    def forward(self, scores: Tensor, at: At) -> Tensor:
        return torch.exp(scores - per_row(self.total, at, "the total"))

    def inplace(self, scores: Tensor, at: At) -> Tensor:
        return scores.sub_(per_row(self.total, at, "the total")).exp_()

    def backward_inplace(self, weights: Tensor, grad: Tensor, at: At) -> Tensor | None:
        assert self.pull is not None
        return grad.add_(per_row(self.pull, at, "the total's gradient")).mul_(weights)


class Distances(MeanDistance):
    """The two sums whose ratio is the mean distance: those of pieces add up."""

    def see(self, tile: Tile) -> tuple[Tensor, ...]:
        weights = tile.weights
        return (weights * tile.at.away(weights.dtype)).sum(-1), weights.sum(-1)

    def widths(self, m: int) -> tuple[tuple[int, ...], ...]:
        return (), ()

    def finish(self, *seen: Tensor) -> Tensor:
        moved, mass = seen
        return torch.where(mass != 0, moved / mass.masked_fill(mass == 0, 1), 0)


class RowMass(Stat):
    """Mass of each row before the edits: its gradient is that of a softmax's total."""

    def __init__(self) -> None:
        super().__init__(edited=False)

    def see(self, tile: Tile) -> tuple[Tensor, ...]:
        return (tile.weights.sum(-1),)


def _looks_alone(edit: Edit) -> bool:
    if isinstance(edit, OnHeads):
        return _looks_alone(edit.edit)
    if isinstance(edit, Mix) and isinstance(edit.other, str) and edit.other == "uniform":
        return False
    return edit.linear or type(edit) in ALONE


def _rescales(edit: Edit) -> bool:
    """Does it commute with a factor of the whole row?"""
    return _rescales(edit.edit) if isinstance(edit, OnHeads) else edit.linear or type(edit) is Scale


def why_not(spec: Attention, stats: Sequence[Stat]) -> str | None:
    """Why the pieces of a program cannot be merged exactly; ``None`` if they can."""
    normalizer, changes = spec.normalizer, list(spec.changes)
    name = type(normalizer).__name__
    if spec.select is not None:
        return f"{type(spec.select).__name__} (select=) chooses among all keys"
    if type(normalizer) not in NORMALIZERS:
        known = ", ".join(n.__name__ for n in NORMALIZERS)
        return f"the normalizer {name} needs all scores of a row at once ({known} do not)"
    row_norm = isinstance(normalizer, ReLU) and normalizer.row_norm
    if row_norm and changes:
        return "the edits would act on weights that ReLU(row_norm=True) divides by the sum of the whole row"
    divided = row_norm
    if changes and type(changes[-1]) is Renormalize:
        divided = True
        changes.pop()
    for edit in changes:
        if type(edit) is Renormalize:
            return "Renormalize needs the sum of the whole row: it may only be the last edit"
        if not _looks_alone(edit):
            inner = edit.edit if isinstance(edit, OnHeads) else edit
            return f"the edit {type(inner).__name__} needs all weights of a row at once"
    for stat in stats:
        kind = type(stat).__name__
        if type(stat) not in (*OF_SCORES, *OF_WEIGHTS):
            known = ", ".join(s.__name__ for s in (*OF_SCORES, *OF_WEIGHTS))
            return f"the stat {kind} has no merge ({known} have)"
        if divided and type(stat) in OF_WEIGHTS and (row_norm or stat.edited):
            mend = "" if row_norm else f"; {kind}(edited=False) looks at them before the edits"
            return f"the stat {kind} needs weights that are divided by the sum of the whole row{mend}"
    return None


class Plan:
    """A program that :func:`why_not` has nothing against, as what is done to every piece.

    Args:
        spec: the program.
        stats: what to look at.
        m: keys of the whole call.
    """

    def __init__(self, spec: Attention, stats: Sequence[Stat], m: int):
        reason = why_not(spec, stats)
        if reason is not None:
            raise Unsupported(f"this program cannot run across ranks, because {reason}")
        self.spec = spec
        normalizer, self.edits = spec.normalizer, list(spec.changes)
        self.divide = bool(self.edits) and isinstance(self.edits[-1], Renormalize)
        if self.divide:
            self.edits.pop()
        self.divisor: float | None = None
        self.sink: Tensor | float | None = None
        self.softmax = isinstance(normalizer, Softmax)
        if isinstance(normalizer, Softmax):
            self.sink, normalizer = normalizer.sink, Softmax()
        elif isinstance(normalizer, ReLU) and normalizer.row_norm:
            self.divide, self.divisor, normalizer = True, normalizer.divisor, ReLU()
        elif isinstance(normalizer, Sigmoid) and normalizer.bias is None:
            normalizer = Sigmoid(-math.log(m))
        self.normalizer = normalizer
        self.stats = [Distances(s.label, s.edited) if type(s) is MeanDistance else s for s in stats]
        self.rescales = all(map(_rescales, self.edits))
        self.one_pass = self.rescales and all(type(s) in OF_SCORES for s in self.stats)

    def spec_at(self, place: Place, normalizer: Normalizer) -> Attention:
        """The program of a piece."""
        mask = self.spec.mask
        return Attention(
            [self.spec.form, *(PlacedScore(s, place) for s in self.spec.modifiers)],
            mask if isinstance(mask, Full) else PlacedMask(mask, place),
            normalizer,
            [PlacedEdit(edit, place) for edit in self.edits],
        )

    def program(self, place: Place, normalizer: Normalizer, stats: Sequence[Stat]) -> Program:
        """What happens to the tiles of a piece."""
        return Program(self.spec_at(place, normalizer), [PlacedStat(s, place) for s in stats])

    def total(self, lse: Tensor) -> Tensor:
        """What the scores of a softmax are reduced by, ``[B, H, n]``, from the log-sum-exp of the keys."""
        if self.sink is not None:
            sink = torch.as_tensor(self.sink, dtype=lse.dtype, device=lse.device)
            lse = torch.logaddexp(lse, sink[:, None] if sink.ndim else sink)
        return lse.masked_fill(lse == HIDDEN, math.inf)


def merge(stat: Stat, whole: Sequence[Tensor], piece: Sequence[Tensor]) -> list[Tensor]:
    """What a stat saw so far, and in one more piece."""
    if isinstance(stat, LogSumExp):
        return [torch.logaddexp(whole[0], piece[0])]
    if isinstance(stat, Max):
        return [torch.maximum(whole[0], piece[0])]
    if isinstance(stat, TopK):
        best, index = torch.cat([whole[0], piece[0]], -1).topk(stat.k, -1)
        return [best, torch.cat([whole[1], piece[1]], -1).gather(-1, index)]
    return [a + b for a, b in zip(whole, piece, strict=True)]


def share(stat: Stat, whole: Sequence[Tensor], grads: Sequence[Tensor], piece: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of what a stat saw in one piece, from those of the whole: the derivative of :func:`merge`."""
    if isinstance(stat, LogSumExp):
        return [grads[0] * weight_of(piece[0], whole[0])]
    if isinstance(stat, Max):
        return [grads[0] * (piece[0] == whole[0])]
    if isinstance(stat, TopK):
        same = (piece[1][..., :, None] == whole[1][..., None, :]) & (piece[1] >= 0)[..., None]
        return [(same * grads[0][..., None, :]).sum(-1)]
    return list(grads)


def weight_of(lse: Tensor, whole: Tensor) -> Tensor:
    """Share of the whole row's mass in a piece, ``exp(lse - whole)``; 0 for a row that sees nothing."""
    return torch.exp(lse - whole.masked_fill(whole == HIDDEN, 0))


def nothing(stat: Stat, like: Tensor) -> list[Tensor]:
    """What a row stat has seen before the first piece: ``like`` is ``[B, H, n]``."""
    fill = HIDDEN if isinstance(stat, OF_SCORES) else 0.0
    return [
        like.new_full((*like.shape, *width), -1, dtype=torch.long)
        if i in stat.keys
        else like.new_full((*like.shape, *width), fill)
        for i, width in enumerate(stat.widths(0))
    ]
