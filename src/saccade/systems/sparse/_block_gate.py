"""The gate of SeerAttention: scores of blocks of queries and keys, from what is left of them when they are pooled.

Paper, code and equations are in :mod:`.seerattention`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.selectors import Select, pool


def turn(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """RoPE of ``[B, H, N, D]`` at positions ``[N]``; negative ones undo it. Halves are the two coordinates."""
    half = x.shape[-1] // 2
    angle = positions[:, None] * theta ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def greatest(x: Tensor, size: int) -> Tensor:
    """Greatest of each run of ``size`` tokens (the last may be shorter): ``[..., N, D]`` to ``[..., N / size, D]``."""
    return F.pad(x, (0, 0, 0, -x.shape[-2] % size), value=-math.inf).unflatten(-2, (-1, size)).amax(-2)


class BlockGate(Select):
    """The gates of a layer, for blocks of so many tokens; without ``width``, that of its heads, they have no matrix."""

    weight: nn.Parameter | None

    def __init__(self, heads: int, width: int | None, block: int, theta: float | None):
        super().__init__(block, block)
        self.theta = theta
        self.weight = None if width is None else nn.Parameter(0.02 * torch.randn(heads, 3 * width, width))

    def pooled(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Means of queries ``[B, H, nq, D]``; greatest, least and mean of keys ``[B, Hkv, nk, 3 D]``; without RoPE."""
        m = k.shape[2]
        if self.theta is not None:
            q, k = (turn(x, -torch.arange(m - x.shape[2], m, device=x.device), self.theta) for x in (q, k))
        size = self.columns
        return pool(q, size), torch.cat([greatest(k, size), -greatest(-k, size), pool(k, size)], -1)

    def logits(self, q: Tensor, k: Tensor, first: int = 0) -> Tensor:
        """Scores of blocks ``[B, H, nq, nk]`` from what :meth:`pooled` gives; ``first``: position of query 0."""
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        k = k[..., -q.shape[-1] :] if self.weight is None else k @ self.weight.to(k.dtype)
        if self.theta is not None:
            q, k = (
                turn(x, start + self.columns * torch.arange(x.shape[2], device=x.device), self.theta)
                for x, start in ((q, first), (k, 0))
            )
        return q @ k.mT * q.shape[-1] ** -0.5
