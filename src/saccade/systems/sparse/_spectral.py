"""How far attention is off in the operator norm, as theorems of approximation have it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ._merged import Found


@torch.no_grad()
def spectral_error(attend: Callable[..., Found], q: Tensor, k: Tensor, v: Tensor) -> float:
    """``|out - W V| / (|W| |V|)`` of ``[B, H, N, D]``, W the dense softmax weights, the mean over heads."""
    w = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
    x = torch.ones_like(v[..., :1])
    for _ in range(10):  # power iteration: the largest singular value of W is far from the second
        x = ((w @ x).mT @ w).mT
        x = x / x.norm(dim=-2, keepdim=True)
    norm = (w @ x).norm(dim=-2)[..., 0]
    size: Tensor = torch.linalg.matrix_norm(attend(q, k, v)[0] - w @ v, 2) / (norm * torch.linalg.matrix_norm(v, 2))
    return float(size.mean())
