"""A spec and its stats as what happens to one tile: the definition, and its fast twin."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import scores
from .normalizers import HIDDEN, Normalizer, Softmax
from .spec import Attention
from .stats import Stat
from .tile import At, Tile


class Veil:
    """What a mask hides in a part of a tile: bool, broadcasts against it."""

    def __init__(self, hidden: Tensor):
        self.hidden = hidden
        self._bits: dict[torch.dtype, tuple[Tensor, Tensor]] = {}

    def fill(self, part: Tensor, value: float) -> None:
        """Put ``value`` (0 or ``-inf``) where a key is hidden, in place.

        On a CPU by operations on the bits: ``masked_fill_`` takes five times as long.
        """
        if part.device.type != "cpu":
            part.masked_fill_(self.hidden, value)
            return
        if part.dtype not in self._bits:
            keep = torch.where(self.hidden, 0, -1).to(_WORDS[part.dtype])
            infinity = torch.tensor(HIDDEN, dtype=part.dtype).view(keep.dtype)
            self._bits[part.dtype] = keep, infinity.masked_fill(~self.hidden, 0)
        keep, infinity = self._bits[part.dtype]
        words = part.view(keep.dtype).bitwise_and_(keep)
        if value:
            words.bitwise_or_(infinity)


_WORDS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
}


@dataclass(frozen=True)
class Hidden:
    """Keys ``start`` to ``stop`` of a tile where the mask must be looked at, and what it hides of them."""

    start: int
    stop: int
    veil: Veil

    def fill(self, tile: Tensor, value: float) -> None:
        """Put ``value`` (0 or ``-inf``) at the hidden places of a tile, in place."""
        self.veil.fill(tile[..., self.start : self.stop], value)


Scratch = Callable[[Sequence[int], torch.dtype, str], Tensor]


@functools.lru_cache(maxsize=64)
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(function, dynamic=True)


class Program:
    """What happens between the scores of a tile and its weights.

    Args:
        spec: the attention program.
        stats: what to look at.
        compile: fuse the plain functions of ``score`` with ``torch.compile`` where no gradient is wanted.
    """

    def __init__(self, spec: Attention, stats: Sequence[Stat] = (), compile: bool = False):
        self.spec, self.stats = spec, tuple(stats)
        self.compile = compile
        # Looked up here once: a module's attributes are slow to reach, and every tile reaches for them.
        self.form, self.normalizer = spec.form, spec.normalizer
        self.modifiers, self.edits = tuple(spec.modifiers), tuple(spec.changes)
        self.scores_hide = any(m.may_hide for m in self.modifiers)
        self.needs_visible = any(e.needs_visible for e in self.edits)
        softmax = isinstance(spec.normalizer, Softmax) and spec.normalizer.sink is None
        early = {i for i, s in enumerate(self.stats) if not s.edited or not self.edits}
        self.early, self.late = early, set(range(len(self.stats))) - early
        self.softmax = softmax
        self.factors = all(self.stats[i].takes_factor for i in self.late)
        needs = [s.needs | (s.shortcut if softmax and i in early else frozenset()) for i, s in enumerate(self.stats)]
        self.needs: frozenset[str] = frozenset().union(*needs)

    @property
    def plain(self) -> bool:
        """Softmax of the scores as they are: no modifier, edit or stat stands between the products."""
        return self.softmax and not self.modifiers and not self.edits and not self.stats

    @property
    def closed_backward(self) -> bool:
        """Can the gradient of the scores be had from the weights, without autograd?"""
        return (
            all(s.shift for s in self.modifiers)
            and all(e.linear for e in self.edits)
            and not self.spec.learned()
            and type(self.normalizer).backward_inplace is not Normalizer.backward_inplace
        )

    def define(self, tile: Tensor, at: At, hidden: Sequence[Hidden]) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
        """Weights and what each stat sees, out of place and differentiable: the definition."""
        for modifier in self.modifiers:
            tile = modifier(tile, at)
        if hidden:
            tile = tile.clone()
            for run in hidden:
                tile[..., run.start : run.stop].masked_fill_(run.veil.hidden, HIDDEN)
        visible = tile > HIDDEN if self.needs_visible else None
        weights = self.normalizer(tile, at)
        rows = Tile(at, weights)
        if "scores" in self.needs:
            rows.scores = tile.masked_fill(tile == HIDDEN, 0)
        if "maximum" in self.needs:
            rows.maximum = tile.amax(-1)
        if "lse" in self.needs:
            rows.lse = _logsumexp(tile)
        seen = self._look(rows, self.early)
        for edit in self.edits:
            weights = edit(weights, at, visible)
        rows.weights = weights
        return weights, self._in_order(seen | self._look(rows, self.late))

    def fast(
        self, tile: Tensor, at: At, hidden: Sequence[Hidden], may_be_empty: bool, scratch: Scratch
    ) -> tuple[Tensor, list[tuple[Tensor, ...]], Tensor | None]:
        """The same where no gradient is wanted; overwrites ``tile``.

        Also a factor ``[g, r, n, 1]`` by which the weights, and so their product with the values, are still to be
        multiplied: one pass over the tile less.
        """
        normalizer = self.normalizer
        tile = self.mask_scores(tile, at, hidden)
        visible = tile > HIDDEN if self.needs_visible else None
        kept = "scores" in self.needs
        wanted = {"maximum"} if kept and self.softmax else {"maximum", "lse"}
        top = tile.amax(-1) if may_be_empty or self.needs & wanted else None
        scores = lse = None
        if kept:
            scores, tile = tile, scratch(tile.shape, tile.dtype, "weights")
            if not isinstance(normalizer, Softmax):
                tile.copy_(scores)
        if isinstance(normalizer, Softmax):
            weights, lse = normalizer.from_scores(tile if scores is None else scores, at, top, out=tile)
            if may_be_empty:
                assert top is not None
                _clear(weights, top)
        else:
            if "lse" in self.needs:
                lse = _logsumexp(tile)
            weights = normalizer.inplace(tile, at)
        if scores is not None:
            _blank(scores, hidden, everywhere=self.scores_hide)
        rows = Tile(at, weights, scores, top, lse, self.softmax)
        seen = self._look(rows, self.early)
        *edits, last = self.edits or (None,)
        for edit in edits:
            weights = edit.inplace(weights, at, visible)
        if last is not None:
            rows.factor = last.row_factor(weights, at) if self.factors else None
            weights = weights if rows.factor is not None else last.inplace(weights, at, visible)
        rows.weights, rows.softmax = weights, False
        return weights, self._in_order(seen | self._look(rows, self.late)), rows.factor

    def _look(self, rows: Tile, which: set[int]) -> dict[int, tuple[Tensor, ...]]:
        return {i: stat.see(rows) for i, stat in enumerate(self.stats) if i in which}

    @staticmethod
    def _in_order(seen: dict[int, tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
        return [seen[i] for i in sorted(seen)]

    def normalize(self, tile: Tensor, at: At, hidden: Sequence[Hidden], may_be_empty: bool) -> Tensor:
        """Weights before the edits, in place: what the closed backward starts from."""
        tile = self.mask_scores(tile, at, hidden)
        top = tile.amax(-1) if may_be_empty and isinstance(self.normalizer, Softmax) else None
        weights = self.normalizer.inplace(tile, at)
        if top is not None:
            _clear(weights, top)
        return weights

    def mask_scores(self, tile: Tensor, at: At, hidden: Sequence[Hidden]) -> Tensor:
        """Modified scores with ``-inf`` where the mask hides a key, in place where possible."""
        for modifier in self.modifiers:
            if self.compile and isinstance(modifier, scores.Function) and modifier._call.broadcasts is not False:
                tile = _compiled(modifier.function)(tile, *at.indices).to(tile.dtype)
            else:
                tile = modifier.inplace(tile, at)
        if hidden and not tile.is_contiguous():  # a function may return an expanded tile
            tile = tile.contiguous()
        for run in hidden:
            run.fill(tile, HIDDEN)
        return tile

    def finish(self, whole: Sequence[Sequence[Tensor]]) -> dict[str, Any]:
        """Results by name from the whole tensors of every stat."""
        return {s.label: s.finish(*tensors) for s, tensors in zip(self.stats, whole, strict=True)}


def _logsumexp(tile: Tensor) -> Tensor:
    """``torch.logsumexp`` whose gradient is zero, not NaN, for a row of ``-inf``."""
    top = tile.amax(-1, keepdim=True)
    empty = top == HIDDEN
    safe = tile.masked_fill(empty, 0)
    return torch.logsumexp(safe, -1).masked_fill(empty[..., 0], HIDDEN)


def _blank(scores: Tensor, hidden: Sequence[Hidden], everywhere: bool) -> None:
    """Put 0 where a key is hidden, so that 0 times the score is 0."""
    if everywhere:
        scores.masked_fill_(scores == HIDDEN, 0)
    for run in hidden:
        run.fill(scores, 0)


def _clear(weights: Tensor, top: Tensor) -> None:
    """Zero the rows that see nothing, where softmax gives NaN."""
    empty = top == HIDDEN
    if weights.device.type != "cpu" or bool(empty.any()):
        weights.masked_fill_(empty[..., None], 0)
