"""RMHA, relative multi-head attention with learned vectors of each distance, and the memory of a step of training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...core import masks, scores
from ...core.attend import attention
from ...core.spec import Attention
from ...core.tile import At
from ...nn import KVCache, MultiHead
from ...nn.attention import AnyCache, padded
from ...nn.backbones import Place


class ByDistance(scores.Score):
    """``score + table[b, h, i, min(i - j, last)]``, of a table ``[B, H, N, distances]``."""

    shift = True
    table: Tensor

    def __init__(self, table: Tensor):
        super().__init__()
        self.hold("table", table)

    def forward(self, score: Tensor, at: At) -> Tensor:
        """The tile, with what the distance of key and query adds."""
        far = at.distance.clamp(0, self.table.shape[-1] - 1)
        return score + self.table[at.b, at.h, at.q, far].to(score.dtype)


class Relative(MultiHead):
    """RMHA: causal multi-head attention with learned vectors of each distance."""

    def __init__(self, place: Place, reach: int):
        super().__init__(Attention(mask=masks.Causal()), place.width, place.heads)
        inner = place.heads * self.head_width
        self.v, self.out = nn.Linear(place.width, inner), nn.Linear(inner, place.width)
        self.distance = nn.Parameter(torch.zeros(place.heads, reach, self.head_width))
        self.distance_bias = nn.Parameter(torch.zeros(place.heads, reach))
        self.query_bias = nn.Parameter(torch.zeros(place.heads, 1, self.head_width))

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, cache: AnyCache | None = None, keep: Tensor | None = None,
        **given: Any,
    ) -> Tensor:  # fmt: skip
        """What the heads read, ``[B, H, N, Dv]``."""
        start = 0 if cache is None else cache.length
        if isinstance(cache, KVCache):
            k, v = cache.append(k, v)
        near = slice(min(k.shape[2], self.distance.shape[1]))
        table = (q @ self.distance[:, near].mT + self.distance_bias[:, None, near]) * self.head_width**-0.5
        spec = Attention(ByDistance(table), masks.Causal())
        q = q + self.query_bias
        return attention(q, k, v, spec if keep is None else padded(spec, keep), offset=start, **given)


def step_bytes(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> int:
    """Bytes that a step of training holds: parameters, gradients, Adam's moments, and what was kept for backward."""
    weights = {p.untyped_storage().data_ptr(): p.nbytes for p in model.parameters()}
    waiting: dict[int, int] = {}

    def note(x: Tensor) -> Tensor:
        waiting[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        kept = loss(model)  # while it lives, no storage that it waits for is used again
    del kept
    return 4 * sum(weights.values()) + sum(size for place, size in waiting.items() if place not in weights)
