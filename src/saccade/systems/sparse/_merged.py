"""Attention to several sets of keys, apart from each other, made one by the sums of their exponentials."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core.attend import attention
from ...core.normalizers import HIDDEN
from ...core.scores import Dot
from ...core.spec import Attention
from ...core.stats import LogSumExp

Found = tuple[Tensor, Tensor]
"""Output ``[B, H, N, Dv]`` and log-sum-exp ``[B, H, N]``."""


def exact(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Any = None) -> Found:
    """The engine's attention with its log-sum-exp; positions count from 0."""
    spec = Attention(score=[Dot(scale)], mask=mask)
    out, seen = attention(q, k, v, spec, stats=[LogSumExp()], offset=0)
    return out, seen["log_sum_exp"]


def merge(one: Found, other: Found) -> Found:
    """Attention to two sets of keys as one."""
    share = torch.sigmoid(one[1] - other[1])[..., None].to(one[0].dtype)
    return share * one[0] + (1 - share) * other[0], torch.logaddexp(one[1], other[1])


def merge_sums(found: list[Found], sums: Tensor, level: Tensor) -> Tensor:
    """The output for sets of keys and for what is known of others: sums of their weights times values.

    Args:
        sums: ``[B, H, N, Dv + 1]``, the last of them that of the weights alone, to be multiplied by ``exp(level)``.
        level: ``[B, H, N]``, minus infinity where there are no others.
    """
    top = torch.stack([level, *(lse for _, lse in found)]).amax(0).detach()
    top = top.masked_fill(top == HIDDEN, 0)  # a row that sees no key
    low = torch.exp(level - top)[..., None] * sums
    total, mass = low[..., :-1], low[..., -1:].clamp(min=0)
    for out, lse in found:
        share = torch.exp(lse - top)[..., None]
        total, mass = total + share * out, mass + share
    return total / mass.clamp(min=1e-6)
