"""Mirrored symbols, random ones and then the same backwards, and what small Perceivers AR learn of how they end."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .perceiver_ar import small

SYMBOLS, HALF = 32, 16
LATENTS = 8


def trained_loss(context: int) -> float:
    """Loss of the last symbols, as many as there are latents, after a short training with this context."""
    from ...study.trainer import train

    model = small(LATENTS, "absolute", SYMBOLS + 1)
    source = torch.Generator().manual_seed(0)

    def loss(count: int) -> Tensor:
        first = torch.randint(SYMBOLS, (count, HALF), generator=source)
        pages = torch.cat([torch.full((count, 1), SYMBOLS), first, first.flip(1)], 1)
        return model.loss(pages[:, -context - 1 :]).mean()

    train(model, lambda: loss(32), 600, 1e-3)
    with torch.no_grad():
        return float(loss(256))


def hidden(context: int) -> float:
    """The least loss possible: nothing is known of a symbol that first stood before the context."""
    return math.log(SYMBOLS) * min(1, max(0, 2 * HALF - 1 - context) / LATENTS)
