"""Mega's Laplace attention function: each weight a function of its own score, which the number of keys has divided."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.normalizers import Normalizer
from ...core.tile import At

CENTRE, SPREAD = math.sqrt(0.5), math.sqrt(0.25 / math.pi)  # where it meets ReLU², in value and in slope


class Laplace(Normalizer):
    """``(1 + erf((s - CENTRE) / (SPREAD sqrt(2)))) / 2``: as ReLU², but bounded in value and slope."""

    def forward(self, scores: Tensor, at: At) -> Tensor:
        return (1 + torch.erf((scores - CENTRE) / (SPREAD * math.sqrt(2)))) / 2


def keys_seen(x: Tensor, start: int, chunk: int | None, causal: bool, keep: Tensor | None) -> Tensor:
    """How many keys each token of ``x [B, N, width]`` sees, the first one at ``start``: ``[N, 1]``, or ``[B, N, 1]``
    where padding is not kept (bool ``[B, N]``)."""
    place = torch.arange(start, start + x.shape[1], device=x.device)
    chunk = chunk or start + x.shape[1]
    if causal:
        return (place % chunk + 1).to(x.dtype)[:, None]
    keep = x.new_ones(1, x.shape[1]) if keep is None else keep.to(x.dtype)
    blocks = F.pad(keep, (0, -keep.shape[1] % chunk)).unflatten(1, (-1, chunk)).sum(-1)
    return blocks.clamp(min=1).repeat_interleave(chunk, 1)[:, : x.shape[1], None]
