"""Edits: from weights to weights, after the normalizer.

An edit never makes a hidden key visible: wherever the mask (or a score of ``-inf``) hides a key, the weight stays 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .errors import SpecError
from .functions import PlainFunction
from .scores import look_up, mix_heads
from .tile import At, Part, Region


class Edit(Part):
    """Base of all edits: :meth:`forward` is the definition, the rest is speed."""

    linear = False  # multiplies each weight by what does not depend on the weights: its own gradient rule
    needs_visible = False  # wants to know which keys of the tile each query may see
    mixes_heads = False  # needs tiles that cover all heads

    def forward(self, weights: Tensor, at: At, visible: Tensor | None) -> Tensor:
        """The edited tile, out of place. ``visible``: bool tile, given only if ``needs_visible``."""
        raise NotImplementedError

    def inplace(self, weights: Tensor, at: At, visible: Tensor | None) -> Tensor:
        """The same where no gradient is wanted; may overwrite ``weights``."""
        return self.forward(weights, at, visible)

    def row_factor(self, weights: Tensor, at: At) -> Tensor | None:
        """``[g, r, n, 1]``, if all that this edit does is to multiply whole rows by it: then the output is, instead."""
        return None


def as_edit(value: Any) -> Edit:
    """An edit from an edit or from a function ``f(weight, b, h, q, k)``."""
    if isinstance(value, Edit):
        return value
    if callable(value):
        return Function(value)
    raise SpecError(f"an edit must be a part of saccade.edits or a function f(weight, b, h, q, k); got {value!r}")


class Function(Edit):
    """Any function ``f(weight, b, h, q, k)`` of the weights, written like a ``score_mod``."""

    needs_visible = True

    def __init__(self, function: Callable[..., Tensor]):
        super().__init__()
        self.function = function
        self._call = PlainFunction(function)

    def forward(self, weights: Tensor, at: At, visible: Tensor | None) -> Tensor:
        edited = self._call(at, weights).to(weights.dtype).expand_as(weights)
        return edited if visible is None else edited.masked_fill(~visible, 0)


class OnHeads(Edit):
    """Another edit on some heads alone: an int, several or a slice."""

    def __init__(self, edit: Edit, heads: Any):
        super().__init__()
        self.edit: Edit = edit
        self.region = Region(heads=heads)
        self.linear, self.needs_visible = edit.linear, edit.needs_visible
        self.mixes_heads = getattr(edit, "mixes_heads", False)

    def forward(self, weights: Tensor, at: At, visible: Tensor | None) -> Tensor:
        where = self.region.where(at)
        assert where is not None
        return torch.where(where, self.edit(weights, at, visible), weights)


class Scale(Edit):
    """Multiply the weights of a region by ``factor``: a number, or one per head ``[H]`` (a learned gate)."""

    factor: Tensor | float

    def __init__(self, factor: Tensor | float, keys: Any = None, queries: Any = None, heads: Any = None):
        super().__init__()
        self.hold("factor", factor)
        self.region = Region(keys, queries, heads)

    @property
    def linear(self) -> bool:  # type: ignore[override]
        return not (isinstance(self.factor, Tensor) and self.factor.requires_grad)

    def _factor(self, at: At, weights: Tensor) -> Tensor:
        factor = torch.as_tensor(self.factor, dtype=weights.dtype, device=weights.device)
        if factor.ndim and factor.shape != (at.heads,):
            raise SpecError(f"Scale: factor must be a number or [{at.heads}]; got {tuple(factor.shape)}")
        factor = factor[at.h] if factor.ndim else factor
        where = self.region.where(at)
        return factor if where is None else torch.where(where, factor, 1)

    def forward(self, weights: Tensor, at: At, visible: Tensor | None) -> Tensor:
        return weights * self._factor(at, weights)

    def inplace(self, weights: Tensor, at: At, visible: Tensor | None) -> Tensor:
        start, stop = self.region.columns(at)
        if start < stop:
            exactly = self.region.is_columns(at) and not isinstance(self.factor, Tensor)
            factor = self.factor if exactly else self._factor(at.columns(start, stop), weights)
            weights[..., start:stop].mul_(factor)
        return weights


class Zero(Edit):
    """Set the weights of a region to zero (knock out attention)."""

    linear = True

    def __init__(self, keys: Any = None, queries: Any = None, heads: Any = None):
        super().__init__()
        self.region = Region(keys, queries, heads)

    def forward(self, weights: Tensor, at: At, visible: Tensor | None) -> Tensor:
        where = self.region.where(at)
        return torch.zeros_like(weights) if where is None else weights.masked_fill(where, 0)

    def inplace(self, weights: Tensor, at: At, visible: Tensor | None) -> Tensor:
        start, stop = self.region.columns(at)
        where = self.region.where(at.columns(start, stop))
        piece = weights[..., start:stop]
        piece.zero_() if where is None else piece.masked_fill_(where, 0)
        return weights


class Replace(Edit):
    """Put given weights (a number, or a tensor that broadcasts to ``[B, H, N, M]``) in a region."""

    needs_visible = True

    weights: Tensor | float

    def __init__(self, weights: Tensor | float, keys: Any = None, queries: Any = None, heads: Any = None):
        super().__init__()
        self.hold("weights", weights)
        self.region = Region(keys, queries, heads)

    def forward(self, weights: Tensor, at: At, visible: Tensor | None) -> Tensor:
        given = _given(self.weights, at, weights, "Replace")
        where = self.region.where(at)
        if visible is not None:
            where = visible if where is None else visible & where
        return given.expand_as(weights) if where is None else torch.where(where, given, weights)


def _given(value: Tensor | float, at: At, like: Tensor, what: str) -> Tensor:
    if isinstance(value, Tensor) and value.ndim >= 2:
        return look_up(value, at, what).to(like.dtype)
    return torch.as_tensor(value, dtype=like.dtype, device=like.device)


class Redistribute(Edit):
    """Move ``share`` of each row's mass on the keys ``source`` to the keys ``target``.

    The target's keys receive in proportion to their own weights; a row whose target holds no mass keeps its own.
    """

    def __init__(self, source: Any, target: Any, share: float = 1.0, queries: Any = None, heads: Any = None):
        super().__init__()
        self.source, self.target = Region(source, queries, heads), Region(target, queries, heads)
        self.share = share

    def forward(self, weights: Tensor, at: At, visible: Tensor | None) -> Tensor:
        source, target = self.source.where(at), self.target.where(at)
        if source is None or target is None:
            raise SpecError("Redistribute needs the keys to take from and the keys to give to")
        target = target & ~source
        taken = torch.where(source, weights, 0).sum(-1, keepdim=True) * self.share
        held = torch.where(target, weights, 0).sum(-1, keepdim=True)
        able = held > 0
        gain = torch.where(able, 1 + taken / held.masked_fill(~able, 1), 1)
        loss = torch.where(able, 1 - self.share, 1.0).to(weights.dtype)
        return weights * torch.where(source, loss, torch.where(target, gain, 1))


class Mix(Edit):
    """``(1 - share) * weights + share * other``: ``"uniform"`` over the visible keys, ``"identity"``, or given.

    Args:
        other: ``"uniform"``, ``"identity"`` (all mass on the query's own position), or a tensor that broadcasts to
            ``[B, H, N, M]``.
        share: a number, or learned: a scalar parameter.
    """

    needs_visible = True

    other: Tensor | str
    share: Tensor | float

    def __init__(self, other: Tensor | str, share: Tensor | float):
        super().__init__()
        if isinstance(other, str) and other not in ("uniform", "identity"):
            raise SpecError(f'Mix: other must be "uniform", "identity" or a tensor; got {other!r}')
        self.hold("other", other)  # type: ignore[arg-type]
        self.hold("share", share)

    def forward(self, weights: Tensor, at: At, visible: Tensor | None) -> Tensor:
        if isinstance(self.other, Tensor):
            other = _given(self.other, at, weights, "Mix")
        elif self.other == "identity":
            other = (at.distance == 0).to(weights.dtype)
        else:
            count = at.m if visible is None else visible.sum(-1, keepdim=True).clamp(min=1)
            other = torch.ones_like(weights) / count
        mixed = torch.lerp(weights, other.expand_as(weights), torch.as_tensor(self.share, dtype=weights.dtype))
        return mixed if visible is None else mixed.masked_fill(~visible, 0)


class Renormalize(Edit):
    """Divide each row by its sum; a row that sums to zero stays as it is."""

    def forward(self, weights: Tensor, at: At, visible: Tensor | None) -> Tensor:
        total = weights.sum(-1, keepdim=True)
        return weights / total.masked_fill(total == 0, 1)

    def inplace(self, weights: Tensor, at: At, visible: Tensor | None) -> Tensor:
        return weights.mul_(self.row_factor(weights, at))

    def row_factor(self, weights: Tensor, at: At) -> Tensor:
        total = weights.sum(-1, keepdim=True)
        return total.masked_fill_(total == 0, 1).reciprocal_()


class Dropout(Edit):
    """Drop each weight with probability ``p`` and scale the rest by ``1 / (1 - p)``.

    The draw is a hash of the seed and of the place (b, h, q, k): the same for forward and backward, for every executor
    and tiling. Call :meth:`reseed` (or give a new seed) for each step.
    """

    linear = True

    def __init__(self, p: float, seed: int = 0):
        super().__init__()
        if not 0 <= p < 1:
            raise SpecError(f"Dropout needs 0 <= p < 1; got {p}")
        self.p, self.seed = p, seed

    def reseed(self, generator: torch.Generator | None = None) -> None:
        """Draw a new seed, from torch's generator if none is given."""
        self.seed = int(torch.randint(2**31, (), generator=generator))

    def dropped(self, at: At) -> Tensor:
        """Bool tile: which weights are dropped."""
        row = _mix(_mix(_mix(at.b.int() + self.seed % 2**31) + at.h.int()) + at.q.int())
        bits = _mix(row ^ _mix(at.k.int() + 0x5BD1E995))
        return bits < int(-(2**31) + self.p * 2**32)

    def forward(self, weights: Tensor, at: At, visible: Tensor | None) -> Tensor:
        return weights.masked_fill(self.dropped(at), 0) / (1 - self.p)

    def inplace(self, weights: Tensor, at: At, visible: Tensor | None) -> Tensor:
        return weights.masked_fill_(self.dropped(at), 0).mul_(1 / (1 - self.p))


def _mix(x: Tensor) -> Tensor:
    """An integer hash with good avalanche (the finalizer of MurmurHash3), on int32 that wraps."""
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * -2048144789
    x ^= (x >> 13) & 0x7FFFF
    x *= -1028477387
    x ^= (x >> 16) & 0xFFFF
    return x


class MixHeads(Edit):
    """``w'[h] = sum_g matrix[h, g] * w[g]``: talking heads after the normalizer (arXiv:2003.02436)."""

    mixes_heads = True

    matrix: Tensor

    def __init__(self, matrix: Tensor):
        super().__init__()
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise SpecError(f"MixHeads needs [H, H]; got {tuple(matrix.shape)}")
        self.hold("matrix", matrix)

    def forward(self, weights: Tensor, at: At, visible: Tensor | None) -> Tensor:
        return mix_heads(weights, at, self.matrix)
