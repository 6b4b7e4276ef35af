"""A score by which queries see, beside their own block, the blocks that were chosen, and the choice gets a gradient."""

from __future__ import annotations

from torch import Tensor

from ...core.scores import Score
from ...core.tile import At


class Chosen(Score):
    """A factor on ``exp(score)`` of keys in other blocks: 1 where they are seen, so that the choice gets a gradient.

    Args:
        open: ``[B, H, M]``, 1 for keys that later blocks see, else 0.
        old: keys before the first block here; what they belong to is over.
        block: tokens of a block.
    """

    open: Tensor

    def __init__(self, open: Tensor, old: int, block: int):
        super().__init__()
        self.hold("open", open)
        self.old, self.block = old, block

    def own(self, row: Tensor, key: Tensor) -> Tensor:
        """Do they lie in one block?"""
        return (row - self.old) // self.block == (key - self.old) // self.block

    def visible(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """Keys of one's own block, and of those that were chosen."""
        return self.own(q, k) | (self.open.detach()[b, h, k] > 0)

    def forward(self, score: Tensor, at: At) -> Tensor:
        factor = self.open[at.b, at.h, at.k].to(score.dtype)
        return score + (factor - 1).masked_fill(self.own(at.row, at.k), 0)
