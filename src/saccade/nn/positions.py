"""Positions that act on queries and keys, or on embeddings. Those that act on scores are parts of saccade.scores.

    RoPE       turns queries and keys by their positions
    Collinear  CoCA: keys are a factor of the query's own direction
    Learned    a vector per position, added to the embeddings

:class:`saccade.scores.ALiBi` and :class:`saccade.scores.RelativeBias` belong into a program's ``score``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core.errors import SpecError


def rotate(x: Tensor, start: int = 0, base: float = 10_000.0) -> Tensor:
    """Turn each pair (i, i + D / 2) of ``[..., N, D]`` by ``position * base^(-2 i / D)`` (arXiv:2104.09864).

    The first position is ``start``. Angles are float32 at least, whatever x is.
    """
    half = x.shape[-1] // 2
    exact = torch.promote_types(x.dtype, torch.float32)
    speed = base ** (-torch.arange(half, device=x.device, dtype=exact) / half)
    angle = torch.arange(start, start + x.shape[-2], device=x.device, dtype=exact)[:, None] * speed
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class RoPE(nn.Module):
    """Rotary positions; scores then depend on distances alone.

    Args:
        base: of the geometric sequence of speeds.
        share: of each head's dimensions that turn, the first ones (GPT-NeoX: 0.25); the others stay as they are.
    """

    def __init__(self, base: float = 10_000.0, share: float = 1.0):
        super().__init__()
        if base <= 0 or not 0 < share <= 1:
            raise SpecError(f"RoPE needs base > 0 and a share in (0, 1]; got {base} and {share}")
        self.base, self.share = base, share

    def forward(self, q: Tensor, k: Tensor, start: int = 0) -> tuple[Tensor, Tensor]:
        """Queries and keys ``[B, H, N, D]`` whose first token stands at ``start``."""
        return self._turn(q, start), self._turn(k, start)

    def _turn(self, x: Tensor, start: int) -> Tensor:
        width = x.shape[-1] if self.share == 1 else int(self.share * x.shape[-1])
        if width < 2 or width % 2:
            raise SpecError(f"RoPE turns pairs of dimensions; {width} of {x.shape[-1]} is no even number above 0")
        turned = rotate(x[..., :width], start, self.base)
        return turned if width == x.shape[-1] else torch.cat([turned, x[..., width:]], -1)


class Collinear(nn.Module):
    """CoCA (arXiv:2309.08646): a key is the query times a factor per pair, so the two never point apart.

        t = relu((k[first half] + k[second half]) / 2)
        score(m, n) = sum over pairs of t[n] |q[m]|² cos((m - n) speed) / sqrt(D)

    written as the dot product of ``(|q|² cos, |q|² sin)`` and ``(t cos, t sin)``. With ``official`` it is what the
    authors' code computes (model/llama/modeling_llama.py): ``q * rotate(q, m)`` and ``rotate((t, t), n)``. That product
    is the paper's only where the rotation of the key commutes with the product with q, which it does not.
    """

    def __init__(self, base: float = 10_000.0, official: bool = False):
        super().__init__()
        self.base, self.official = base, official

    def forward(self, q: Tensor, k: Tensor, start: int = 0) -> tuple[Tensor, Tensor]:
        """Queries ``[B, H, N, D]`` and the keys' factors ``[B, Hkv, N, D]`` to what a dot product compares."""
        if q.shape[-1] % 2:
            raise SpecError(f"Collinear needs pairs of dimensions; a head's width is {q.shape[-1]}")
        a, b = q.chunk(2, -1)
        first, second = k.chunk(2, -1)
        factor = torch.relu((first + second) / 2)
        if self.official:
            return q * rotate(q, start, self.base), rotate(torch.cat([factor, factor], -1), start, self.base)
        square, nothing = a * a + b * b, torch.zeros_like(a)
        query = rotate(torch.cat([square, nothing], -1), start, self.base)
        return query, rotate(torch.cat([factor, torch.zeros_like(factor)], -1), start, self.base)


class Learned(nn.Module):
    """A learned vector per position, added to embeddings ``[B, N, width]`` (GPT-2, BERT, ViT)."""

    def __init__(self, length: int, width: int):
        super().__init__()
        self.table = nn.Embedding(length, width)

    def forward(self, x: Tensor, start: int = 0) -> Tensor:
        """The embeddings with the positions from ``start`` on. Raises: SpecError past the last position."""
        stop, length = start + x.shape[-2], self.table.num_embeddings
        if stop > length:
            raise SpecError(f"there are learned positions for {length} tokens, and these reach to {stop}")
        return x + self.table.weight[start:stop]
