"""The short training of the claims about latent architectures."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn


def train(model: nn.Module, loss: Callable[[], Tensor], steps: int, lr: float) -> None:
    """Adam with warm-up, cosine decay to a tenth and clipped gradients; ``loss()`` is that of a fresh batch."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 50, 0.55 + 0.45 * math.cos(math.pi * step / steps))
    )
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
