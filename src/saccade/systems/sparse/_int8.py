"""Queries and keys in 8 bits, as SageAttention rounds them: by blocks of tokens, keys less their mean."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ...core.scores import Dot


class Int8(Dot):
    """Dot product of queries and centered keys, rounded to 255 steps in blocks of ``rows`` and ``columns`` tokens.

    Gradients ignore the rounding.
    """

    def __init__(self, rows: int, columns: int):
        super().__init__()
        self.rows, self.columns = rows, columns

    def prepare(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return _rounded(q, self.rows), _rounded(k - k.mean(-2, keepdim=True), self.columns)


def _rounded(x: Tensor, size: int) -> Tensor:
    blocks = F.pad(x.detach(), (0, 0, 0, -x.shape[-2] % size)).unflatten(-2, (-1, size))
    step = blocks.abs().amax((-2, -1), keepdim=True) / 127 + 1e-7
    rounded = ((blocks / step).round() * step).flatten(-3, -2)[..., : x.shape[-2], :]
    return x + (rounded - x.detach())
