"""What the systems with random features share: how features are drawn, and the linear pass."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def orthogonal(rows: int, width: int, source: torch.Generator) -> Tensor:
    """Random features ``[rows, width]``: orthogonal within each ``width`` of them, as long as normal vectors are."""
    blocks = torch.randn(-(-rows // width), width, width, generator=source)
    turned, upper = torch.linalg.qr(blocks)
    turned = turned * upper.diagonal(dim1=-2, dim2=-1).sign()[:, None]
    lengths = torch.randn(rows, width, generator=source).norm(dim=-1, keepdim=True)
    return lengths * turned.mT.flatten(0, 1)[:rows]


def linear(q: Tensor, k: Tensor, v: Tensor, causal: bool, chunk: int = 128) -> Tensor:
    """``(q k^T) v`` of ``[B, H, N, ...]``, the product masked to the past if causal, in linear memory."""
    if not causal:
        return q @ (k.mT @ v)
    n = q.shape[2]
    q, k, v = (pad(x, (0, 0, 0, -n % chunk)).unflatten(2, (-1, chunk)) for x in (q, k, v))
    sums = k.mT @ v
    return (q @ (sums.cumsum(2) - sums) + (q @ k.mT).tril() @ v).flatten(2, 3)[:, :, :n]
