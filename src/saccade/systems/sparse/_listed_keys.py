"""Attention of every query to a few keys of its own, which are listed."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.attend import attention
from ...core.scores import Dot
from ...core.spec import Attention

ROWS = 128  # queries whose keys are gathered at a time


def gathered(q: Tensor, k: Tensor, v: Tensor, keys: Tensor) -> Tensor:
    """Attention of each query to the keys listed for it ``[B, H, N, s]``, -1 for none; scores are not scaled.

    Every query is a sample of the engine's batch: a program that selects single keys would lay out N x N blocks.
    """

    def rows(q: Tensor, keys: Tensor) -> Tensor:
        index = keys.clamp(min=0).flatten(2)[..., None]
        near_k, near_v = (x.gather(2, index.expand(*index.shape[:3], x.shape[-1])) for x in (k, v))
        near_k, near_v = (x.reshape(-1, 1, keys.shape[3], x.shape[-1]) for x in (near_k, near_v))
        listed = keys.flatten(0, 2) >= 0
        program = Attention(score=[Dot(1.0)], mask=lambda b, h, q, k: listed[b, k])
        out: Tensor = attention(q.reshape(-1, 1, 1, q.shape[-1]), near_k, near_v, program)
        return out.view(*keys.shape[:3], -1)

    return torch.cat([rows(*part) for part in zip(q.split(ROWS, 2), keys.split(ROWS, 2), strict=True)], 2)
