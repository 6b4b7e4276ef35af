"""A bias by the place of a patch, for scores between a grid of patches and a few agents: a picture and two tables."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

BLOCK = 7  # a side of the picture that is stretched over the grid


class GridBias(nn.Module):
    """What the place of a patch adds to the scores of an agent, by head. ``grid``: for numbers by row and column."""

    def __init__(self, heads: int, agents: int, grid: tuple[int, int] | None):
        super().__init__()

        def table(width: int) -> nn.Embedding:  # a layer, so that the backbone's seed draws it
            made = nn.Embedding(heads * agents, width)
            nn.init.trunc_normal_(made.weight, std=0.02)
            return made

        self.shape = heads, agents
        self.block = table(BLOCK * BLOCK)
        self.row = None if grid is None else table(grid[0])
        self.column = None if grid is None else table(grid[1])

    def forward(self, grid: tuple[int, int]) -> Tensor:
        """``[H, agents, N]``."""
        found = F.interpolate(self.block.weight.view(*self.shape, BLOCK, BLOCK), grid, mode="bilinear")
        if self.row is not None and self.column is not None:
            found = found + self.row.weight.view(*self.shape, -1, 1) + self.column.weight.view(*self.shape, 1, -1)
        return found.flatten(2)
