"""Rows in another order, and cut into blocks."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import pad


def take(x: Tensor, index: Tensor) -> Tensor:
    """Rows ``[B, H, S]`` of ``[B, H, N, D]``."""
    return x.gather(2, index[..., None].expand(*index.shape, x.shape[-1]))


def cut(x: Tensor, count: int, size: int, fill: int = 0) -> Tensor:
    """``[B, H, N, D]`` as ``count`` blocks of ``size`` rows, ``[B * H, count, size, D]``, the last filled up."""
    x = pad(x, (0, 0, 0, count * size - x.shape[2]), value=fill)
    return x.reshape(-1, count, size, x.shape[-1])
