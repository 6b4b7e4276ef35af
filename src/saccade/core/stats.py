"""Stats: what the user wants to see of the weights, reduced while the tiles pass.

A stat reduces a tile over keys (one value per query), over queries (one per key) or over blocks; the executor puts the
pieces together. Results come back as ``seen[name]``, the name being the class name in snake case. Stats are
differentiable, so they may stand in a loss.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .errors import SpecError
from .normalizers import row_dot
from .tile import Part, Region, Tile


class Stat(Part):
    """Base of all stats.

    Args:
        name: key of the result; the class name in snake case if not given.
        edited: look at the weights after the edits (those that multiply the values) or before them.
    """

    axis = "rows"  # what is kept: "rows", "keys" (summed over queries), "blocks", or "chosen" rows
    needs: frozenset[str] = frozenset()  # of "scores", "maximum", "lse"
    shortcut: frozenset[str] = frozenset()  # the same, for a cheaper way where the weights are an unedited softmax
    takes_factor = False  # can see weights that are still to be multiplied by a factor of each row
    keys: frozenset[int] = frozenset()  # which of the tensors hold key numbers (int64, -1: none), for axis "rows"
    block = (1, 1)  # queries and keys per block, for axis "blocks"

    def __init__(self, name: str | None = None, edited: bool = True):
        super().__init__()
        self.label = name or re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(self).__name__).lower()
        self.edited = edited

    def see(self, tile: Tile) -> tuple[Tensor, ...]:
        """Reduce a tile: rows ``[g, r, n, ...]``, keys ``[g, r, m]``, blocks ``[g, r, n / block, nk]``."""
        raise NotImplementedError

    def widths(self, m: int) -> tuple[tuple[int, ...], ...]:
        """Shape after ``[B, H, N]`` of each tensor :meth:`see` returns, for axis "rows"."""
        return ((),)

    def chosen(self, n: int) -> list[int]:
        """The rows of n that are kept, for axis "chosen"."""
        return []

    def finish(self, *seen: Tensor) -> Any:
        """The result, from the whole tensors ``[B, H, ...]``."""
        return seen[0]


class LogSumExp(Stat):
    """Log-sum-exp of each row's scores, ``[B, H, N]``; ``-inf`` for a row that sees nothing."""

    needs = frozenset({"lse"})

    def see(self, tile: Tile) -> tuple[Tensor, ...]:
        assert tile.lse is not None
        return (tile.lse,)


class Max(Stat):
    """Greatest score of each row, ``[B, H, N]``."""

    needs = frozenset({"maximum"})

    def see(self, tile: Tile) -> tuple[Tensor, ...]:
        assert tile.maximum is not None
        return (tile.maximum,)


class Entropy(Stat):
    """``-sum w ln w`` of each row in nats, ``[B, H, N]``; the weights are taken as they are, negative ones as none."""

    shortcut = frozenset({"scores", "lse"})

    def see(self, tile: Tile) -> tuple[Tensor, ...]:
        weights = tile.weights
        if tile.softmax and tile.scores is not None and tile.lse is not None:  # no logarithm: ln w = s - lse
            entropy = tile.lse - row_dot(weights, tile.scores)[..., 0]
            return (entropy.clamp_(min=0),)  # -inf for a row that sees nothing
        if torch.is_grad_enabled() and weights.requires_grad:
            safe = torch.where(weights > 0, weights, 1)
            return (-(safe * safe.log()).sum(-1),)
        floor = weights.clamp(min=torch.finfo(weights.dtype).tiny)  # where w <= 0 the product below is negligible
        return (row_dot(floor, floor.log()).squeeze(-1).neg_(),)


class MeanDistance(Stat):
    """Mean of ``|row - k|`` under each row's weights, ``[B, H, N]``; 0 for a row without mass."""

    def see(self, tile: Tile) -> tuple[Tensor, ...]:
        weights = tile.weights
        total = weights.sum(-1)
        moved = (weights * tile.at.away(weights.dtype)).sum(-1)
        return (torch.where(total != 0, moved / total.masked_fill(total == 0, 1), 0),)


class RegionMass(Stat):
    """Mass of each row in named regions of keys: a dict of ``[B, H, N]``.

    Args:
        regions: name to keys, as :class:`saccade.Region` takes them, or to a ``Region``.
    """

    def __init__(self, regions: Mapping[str, Any], name: str | None = None, edited: bool = True):
        super().__init__(name, edited)
        if not regions:
            raise SpecError("RegionMass needs at least one region")
        self.regions = {n: r if isinstance(r, Region) else Region(keys=r) for n, r in regions.items()}

    def see(self, tile: Tile) -> tuple[Tensor, ...]:
        weights = tile.weights
        masses = []
        for region in self.regions.values():
            where = region.where(tile.at)
            masses.append((weights if where is None else torch.where(where, weights, 0)).sum(-1))
        return tuple(masses)

    def widths(self, m: int) -> tuple[tuple[int, ...], ...]:
        return ((),) * len(self.regions)

    def finish(self, *seen: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.regions, seen, strict=True))


class KeyMass(Stat):
    """Mass each key receives, summed over the queries, ``[B, H, M]``."""

    axis = "keys"
    takes_factor = True

    def see(self, tile: Tile) -> tuple[Tensor, ...]:
        weights, factor = tile.weights, tile.factor
        g, r, n, m = weights.shape
        rows = weights.new_ones(1, 1, n).expand(g * r, 1, n) if factor is None else factor.reshape(g * r, 1, n)
        return (torch.bmm(rows, weights.reshape(g * r, n, m)).view(g, r, m),)


class Best(NamedTuple):
    """Result of :class:`TopK`: weights and key positions, both ``[B, H, N, k]``, greatest first."""

    weights: Tensor
    keys: Tensor


class TopK(Stat):
    """The ``k`` greatest weights above 0 of each row, and their keys. Where there are fewer: weight 0, key -1."""

    keys = frozenset({1})

    def __init__(self, k: int, name: str | None = None, edited: bool = True):
        super().__init__(name, edited)
        if k < 1:
            raise SpecError(f"TopK needs k >= 1; got {k}")
        self.k = k

    def see(self, tile: Tile) -> tuple[Tensor, ...]:
        weights = tile.weights
        best, index = weights.topk(min(self.k, weights.shape[-1]), -1)
        keys = tile.at.k.expand(*weights.shape[:2], 1, -1).expand_as(weights).gather(-1, index)
        best = best.clamp(min=0)
        keys = keys.masked_fill(best == 0, -1)
        missing = self.k - best.shape[-1]
        if missing:
            best = torch.nn.functional.pad(best, (0, missing))
            keys = torch.nn.functional.pad(keys, (0, missing), value=-1)
        return best, keys

    def widths(self, m: int) -> tuple[tuple[int, ...], ...]:
        return (self.k,), (self.k,)

    def finish(self, *seen: Tensor) -> Best:
        return Best(seen[0], seen[1])


class _BlockStat(Stat):
    axis = "blocks"

    def __init__(self, block: int | tuple[int, int] = 64, name: str | None = None, edited: bool = True):
        super().__init__(name, edited)
        self.block = (block, block) if isinstance(block, int) else (block[0], block[1])
        if min(self.block) < 1:
            raise SpecError(f"{type(self).__name__} needs blocks of at least 1; got {block}")

    def _over_keys(self, tile: Tile, reduce: str) -> Tensor:
        """Reduce the keys of each block: ``[g, r, n, nk]``."""
        weights, at = tile.weights, tile.at
        columns = self.block[1]
        count = -(-at.m // columns)
        if at.first is not None:  # a range of keys: its blocks lie side by side
            before = at.first % columns
            after = -(before + weights.shape[-1]) % columns
            whole = torch.nn.functional.pad(weights, (before, after)) if before or after else weights
            apart = whole.unflatten(-1, (-1, columns))
            blocks = apart.amax(-1).clamp(min=0) if reduce == "amax" else apart.sum(-1)
            first = at.first // columns
            return torch.nn.functional.pad(blocks, (first, count - first - blocks.shape[-1]))
        index = (at.k // self.block[1]).expand(*weights.shape[:2], 1, -1).expand_as(weights)
        empty = weights.new_zeros(*weights.shape[:-1], count)
        return empty.scatter_reduce(-1, index, weights, reduce)

    def _over_rows(self, values: Tensor, reduce: str) -> Tensor:
        rows = self.block[0]
        values = torch.nn.functional.pad(values, (0, 0, 0, -values.shape[-2] % rows))
        values = values.unflatten(-2, (-1, rows))
        return values.amax(-2) if reduce == "amax" else values.sum(-2)


class BlockMax(_BlockStat):
    """Greatest weight in each block of queries and keys (at least 0), ``[B, H, nq, nk]``."""

    def see(self, tile: Tile) -> tuple[Tensor, ...]:
        return (self._over_rows(self._over_keys(tile, "amax"), "amax"),)


class BlockMean(_BlockStat):
    """Mean weight in each block of queries and keys (hidden places count as 0), ``[B, H, nq, nk]``."""

    def see(self, tile: Tile) -> tuple[Tensor, ...]:
        total = self._over_rows(self._over_keys(tile, "sum"), "sum")
        at, (rows, columns) = tile.at, self.block
        first = at.q.reshape(at.q.shape[0], -1)[:, ::rows]
        tall = (at.n - first // rows * rows).clamp(max=rows)[:, None, :, None]
        k = torch.arange(total.shape[-1], device=total.device)
        wide = (at.m - k * columns).clamp(max=columns)
        return (total / (tall * wide),)


class Rows(Stat):
    """Exact weights of chosen queries, ``[B, H, len(rows), M]``.

    Args:
        rows: queries of this call, from 0; negative ones count from the end.
    """

    axis = "chosen"

    def __init__(self, rows: Sequence[int] | Tensor, name: str | None = None, edited: bool = True):
        super().__init__(name, edited)
        self.rows = torch.as_tensor(rows).reshape(-1).tolist()

    def chosen(self, n: int) -> list[int]:
        """The rows as positive numbers."""
        outside = [r for r in self.rows if not -n <= r < n]
        if outside:
            raise SpecError(f"Rows: {outside} lie outside the {n} queries")
        return [r % n for r in self.rows]

    def see(self, tile: Tile) -> tuple[Tensor, ...]:
        return (tile.weights,)


def check_names(stats: Sequence[Stat]) -> None:
    """Refuse two stats of one name, and what is no stat."""
    for stat in stats:
        if not isinstance(stat, Stat):
            raise SpecError(f"stats must be parts of saccade.stats, such as stats.Entropy(); got {stat!r}")
    names = [s.label for s in stats]
    twice = {n for n in names if names.count(n) > 1}
    if twice:
        raise SpecError(f"two stats are called {sorted(twice)}: give one a name=")
