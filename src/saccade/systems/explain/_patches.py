"""Where the heads of a vision transformer look: stats of the weights on patches, which lie on a grid.

``columns`` of the grid (``None``: as square as can be) and ``prefix``, how many tokens come before it, mean the same
everywhere here.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...core.errors import SpecError
from ...core.stats import Rows, Stat
from ...core.tile import Tile
from ..linear._grid import sides


def grid(patches: int, columns: int | None = None) -> tuple[int, int]:
    """Rows and columns. SpecError: so many patches are no grid of these columns."""
    if columns is None:
        return sides(patches)
    if columns < 1 or patches % columns:
        raise SpecError(f"{patches} patches are no grid of {columns} columns: give columns= and prefix= as they are")
    return patches // columns, columns


def steps(query: Tensor, key: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Columns to the right and rows down from patches to others, both by their numbers."""
    return key % columns - query % columns, key // columns - query // columns


class _OnPatches(Stat):
    """A stat of queries by the patches among their keys."""

    def __init__(self, columns: int | None = None, prefix: int = 0, name: str | None = None):
        super().__init__(name)
        self.columns, self.prefix = columns, prefix

    def grid(self, m: int) -> tuple[int, int]:
        """Rows and columns of the grid among m keys."""
        return grid(max(m - self.prefix, 1), self.columns)

    def steps(self, tile: Tile) -> tuple[Tensor, Tensor, Tensor]:
        """Columns to the right and rows down from each query to each key of a tile, and which keys are patches."""
        key, query = tile.at.k - self.prefix, tile.at.row - self.prefix
        return *steps(query, key, self.grid(tile.at.m)[1]), key >= 0


class Displacement(_OnPatches):
    """From each query, under its weights on patches: columns to the right, rows down, and the distance in patches.

    ``[B, H, N, 3]``; 0 for a query without weight on a patch.
    """

    def see(self, tile: Tile) -> tuple[Tensor, ...]:
        """Means over the tile's keys."""
        across, down, patch = self.steps(tile)
        weights = tile.weights * patch
        total = weights.sum(-1)
        away = (across.square() + down.square()).to(weights.dtype).sqrt()
        moved = torch.stack([(weights * x).sum(-1) for x in (across, down, away)], -1)
        return (moved / total.masked_fill(total == 0, math.inf)[..., None],)

    def widths(self, m: int) -> tuple[tuple[int, ...], ...]:
        """Three numbers."""
        return ((3,),)


class Hops(_OnPatches):
    """Weight of a query's patches by how far they are along the farther axis: ``[B, H, N, hops]``, from 0 hops."""

    def see(self, tile: Tile) -> tuple[Tensor, ...]:
        """Sums over the tile's keys."""
        across, down, patch = self.steps(tile)
        away = torch.where(patch, torch.maximum(across.abs(), down.abs()), -1)
        return (torch.stack([(tile.weights * (away == k)).sum(-1) for k in range(max(self.grid(tile.at.m)))], -1),)

    def widths(self, m: int) -> tuple[tuple[int, ...], ...]:
        """As many as the longer side has patches."""
        return ((max(self.grid(m)),),)


class Maps(Rows):
    """All rows: ``[B, H, N, N]``, to be had of short sequences alone."""

    def __init__(self) -> None:
        super().__init__([])

    def chosen(self, n: int) -> list[int]:
        """Every query."""
        return list(range(n))
