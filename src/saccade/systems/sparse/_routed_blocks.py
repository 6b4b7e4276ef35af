"""Routing of single queries to blocks of keys, shared by those that rank earlier blocks and always read their own."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...core.masks import EMPTY


def own_and_best(score: Tensor, codes: Tensor, keep: int) -> Tensor:
    """Numbers of the newest block that each query sees, its own, and of the ``keep`` earlier ones that score highest.

    Args:
        score: of each query and block, ``[B, H, N, nk]``.
        codes: what the mask says of them (see :meth:`saccade.core.selectors.Select.choose`, with ``rows=1``).
        keep: how many.

    Returns:
        int64 ``[B, H, N, s]``, at most ``keep + 1`` of them; -1 where a query has fewer.
    """
    order = torch.arange(score.shape[-1], device=score.device)
    visible = codes > EMPTY
    own = torch.where(visible, order, -1).amax(-1, keepdim=True)
    best, blocks = score.masked_fill(~visible | (order >= own), -math.inf).topk(min(keep, len(order)), -1)
    return torch.cat([own.expand(*blocks.shape[:-1], 1), blocks.masked_fill(best == -math.inf, -1)], -1)
