"""All symbols in a random order, and again in that order from a random one on: what follows each is to be recalled."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .batches import IGNORED


def rotation(symbols: int, seed: int, batch: int = 16) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches: tokens and labels ``[batch, 2 * symbols - 1]``; each symbol but the last of the second round is
    to be told from the one before it."""
    source = torch.Generator().manual_seed(seed)
    while True:
        first = torch.rand(batch, symbols, generator=source).argsort(1)
        turn = (torch.arange(symbols) + torch.randint(symbols, (batch, 1), generator=source)) % symbols
        tokens = torch.cat([first, first.gather(1, turn)], 1)
        labels = tokens[:, 1:].clone()
        labels[:, :symbols] = IGNORED
        yield tokens[:, :-1], labels
