"""Programs that FlexAttention's paper and PyTorch's announcement of it show, as functions of scores and places."""

from __future__ import annotations

import torch
from torch import Tensor

from .flexattention import MaskMod, ScoreMod, causal


def published(n: int, heads: int) -> dict[str, tuple[ScoreMod | None, MaskMod | None]]:
    """By name, for ``n`` tokens (a square) and ``heads`` heads."""
    side = round(n**0.5)
    document = torch.arange(n) * 3 // n
    table = torch.linspace(-1, 1, heads * n).view(heads, n)
    pages = torch.arange(n).flip(0)  # the logical position of what lies at each place of a paged cache

    def packed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (document[q] == document[k]) & causal(b, h, q, k)

    def neighbors(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return ((q // side - k // side).abs() <= 2) & ((q % side - k % side).abs() <= 2)

    return {
        "full": (None, None),
        "causal": (None, causal),
        "relative position": (lambda s, b, h, q, k: s + (q - k), None),
        "alibi": (lambda s, b, h, q, k: s + torch.exp2(-((h + 1) * 8.0 / heads)) * (k - q), causal),
        "softcap": (lambda s, b, h, q, k: 20 * torch.tanh(s / 20), causal),
        "bias of the head": (lambda s, b, h, q, k: s + table[h, k], None),
        "mask as a score": (lambda s, b, h, q, k: torch.where(q >= k, s, -float("inf")), None),
        "sliding window": (None, lambda b, h, q, k: (q >= k) & (q - k <= n // 4)),
        "dilated window": (None, lambda b, h, q, k: ((q - k).abs() <= n // 4) & ((q - k) % 2 == 0)),
        "prefix": (None, lambda b, h, q, k: (k < n // 3) | (q >= k)),
        "documents": (None, lambda b, h, q, k: document[q] == document[k]),
        "packed, soft cap": (lambda s, b, h, q, k: 20 * torch.tanh(s / 20), packed),
        "neighborhood": (None, neighbors),
        "paged": (None, lambda b, h, q, k: q >= pages[k]),
    }
