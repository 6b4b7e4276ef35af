"""What the systems with random features share: how features are drawn, exponential ones, and the linear pass."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...core.normalizers import HIDDEN


def orthogonal(rows: int, width: int, source: torch.Generator) -> Tensor:
    """Random features ``[rows, width]``: orthogonal within each ``width`` of them, as long as normal vectors are."""
    blocks = torch.randn(-(-rows // width), width, width, generator=source)
    turned, upper = torch.linalg.qr(blocks)
    turned = turned * upper.diagonal(dim1=-2, dim2=-1).sign()[:, None]
    lengths = torch.randn(rows, width, generator=source).norm(dim=-1, keepdim=True)
    return lengths * turned.mT.flatten(0, 1)[:rows]


def exponential(features: Tensor, q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """``exp(+-W x' - |x'|^2 / 2) / sqrt(F)``, x' = x sqrt(scale): on average, products are ``exp(scale q . k)``.

    Args:
        features: W ``[F / 2, D]``; without any the level is minus infinity.
        q, k: ``[B, H, N, D]`` and ``[B, H, M, D]``.

    Returns:
        Features of queries and keys ``[B, H, .., F]``; their products are to be multiplied by ``exp(level)``, and the
        level is ``[B, H, N]``.
    """
    half = scale**0.5 * features.to(q)
    if not len(half):
        return q[..., :0], k[..., :0], torch.full_like(q[..., 0], HIDDEN)
    turned_q, turned_k = (torch.cat([x @ half.mT, -x @ half.mT], -1) for x in (q, k))
    size_q, size_k = (scale / 2 * x.square().sum(-1, keepdim=True) for x in (q, k))
    top_q, top_k = turned_q.amax(-1, keepdim=True), (turned_k - size_k).amax((-2, -1), keepdim=True)
    level = (top_q - size_q + top_k)[..., 0] - math.log(2 * len(half))
    return torch.exp(turned_q - top_q), torch.exp(turned_k - size_k - top_k), level


def linear(q: Tensor, k: Tensor, v: Tensor, causal: bool, chunk: int = 128) -> Tensor:
    """``(q k^T) v`` of ``[B, H, N, ...]``, the product masked to the past if causal, in linear memory."""
    if not causal:
        return q @ (k.mT @ v)
    n = q.shape[2]
    q, k, v = (pad(x, (0, 0, 0, -n % chunk)).unflatten(2, (-1, chunk)) for x in (q, k, v))
    sums = k.mT @ v
    return (q @ (sums.cumsum(2) - sums) + (q @ k.mT).tril() @ v).flatten(2, 3)[:, :, :n]
