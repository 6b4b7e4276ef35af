"""What prefill selectors share: exact weights of the last queries, summed by key and by distance, and block lists."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.selectors import Selection


def last_weights(q: Tensor, k: Tensor, rows: int) -> Tensor:
    """Causal softmax weights of the last ``rows`` queries, which are the last of the keys: ``[B, H, rows, M]``."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    score = (q[:, :, -rows:] * q.shape[-1] ** -0.5) @ k.mT
    future = torch.ones(rows, rows, dtype=torch.bool, device=q.device).triu(1)
    score[..., -rows:].masked_fill_(future, float("-inf"))
    return score.softmax(-1, dtype=torch.float32)


def by_distance(weights: Tensor) -> Tensor:
    """Sums along the diagonals of :func:`last_weights`, the query's own key first: ``[B, H, M]``."""
    rows, m = weights.shape[-2:]
    # Read row by row, one longer than they are, padded rows move one to the right: diagonals become columns.
    flat = F.pad(weights, (rows - 1, 0)).flatten(-2)
    return F.pad(flat, (0, rows)).unflatten(-1, (rows, m + rows))[..., :m].sum(-2).flip(-1)


def largest(score: Tensor, count: Tensor | int) -> Tensor:
    """Bool like ``score``: is it one of the ``count`` (broadcasting, last axis 1) largest of its row?"""
    order = score.argsort(dim=-1, descending=True, stable=True)
    first = torch.arange(score.shape[-1], device=score.device) < count
    return torch.zeros_like(score, dtype=torch.bool).scatter_(-1, order, first.expand(score.shape))


def listed(keep: Tensor, rows: int, columns: int) -> Selection:
    """A selection from a map of blocks, bool ``[B, H, nq, nk]``."""
    most = int(keep.sum(-1).amax())
    place = torch.where(keep, keep.cumsum(-1) - 1, most)
    blocks = place.new_full((*keep.shape[:-1], most + 1), -1)
    numbers = torch.arange(keep.shape[-1], device=keep.device).expand(keep.shape)
    return Selection(blocks.scatter_(-1, place, numbers)[..., :most], rows, columns)
