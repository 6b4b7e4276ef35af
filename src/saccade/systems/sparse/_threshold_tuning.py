"""SpargeAttn's tuning: for each head, the two thresholds that let it do the least work within an error."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core import masks
from ...core.attend import attention
from ...core.spec import Attention
from .spargeattn import COLUMNS, L1, ROWS, MeanSim, SpargeAttn

GRID = (0.0, 0.2, 0.4, 0.6, 0.8)  # similarities to try


@torch.no_grad()
def tune(
    q: Tensor, k: Tensor, v: Tensor, bound: float = L1, steps: int = 6, sink: bool = True
) -> tuple[list[float], list[float]]:
    """Similarity and mass for each head of a layer, on one text ``[1, H, N, D]``: least work with an L1 error in bound.

    For each similarity tried, ``steps`` halvings find the least mass (1: none is enough).
    """
    dense = attention(q, k, v, Attention(mask=masks.Causal()))
    heads, codes = q.shape[1], masks.Causal().blocks(masks.Span.grid(q.shape[2], k.shape[2], ROWS, COLUMNS))
    masses, works = torch.ones(len(GRID), heads), torch.zeros(len(GRID), heads)
    for i, similarity in enumerate(GRID):
        low, high = torch.zeros(heads), masses[i]
        for _ in range(steps):
            middle = (low + high) / 2
            off = attention(q, k, v, SpargeAttn(similarity, middle.tolist(), sink=sink).build(heads)) - dense
            good = off.abs().sum((0, 2, 3)) < bound * dense.abs().sum((0, 2, 3))
            low, high = torch.where(good, low, middle), torch.where(good, middle, high)
        masses[i] = high
        chosen = MeanSim(similarity, high.tolist(), sink).choose(q, k, codes[None, None]).blocks
        works[i] = (chosen >= 0).sum((0, 2, 3))
    best = works.argmin(0)
    return [GRID[i] for i in best], masses.gather(0, best[None])[0].tolist()
