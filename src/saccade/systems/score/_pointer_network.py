"""The recurrent network of :mod:`.pointer_networks`: one LSTM reads points, another says which of them, by pointing."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from .pointer_networks import Pointing

FIRST = 0.08  # weights are drawn from +- this


class PointerNetwork(nn.Module):
    """Points ``[B, N, 2]`` and an answer so far to logits of the next position; 0 is the end, points count from 1.

    Args:
        pointing: makes what points, from its width.
        hidden: width of both LSTMs.
        table: answers of the paper's baseline, which blends instead of pointing; ``None``: a pointer network.
    """

    def __init__(self, pointing: Callable[[int], Pointing], hidden: int = 256, table: int | None = None):
        super().__init__()
        self.embed = nn.Linear(2, hidden, bias=False)
        self.encoder, self.decoder = (nn.LSTM(hidden, hidden, batch_first=True) for _ in range(2))
        self.end = nn.Parameter(torch.zeros(hidden))
        self.pointing = pointing(hidden)
        self.table = None if table is None else nn.Linear(2 * hidden, table)
        for p in self.parameters():
            nn.init.uniform_(p, -FIRST, FIRST)

    def forward(self, points: Tensor, answer: Tensor) -> Tensor:
        """Logits ``[B, M + 1, N + 1]`` of what follows each of the answer ``[B, M]`` (what follows its end is junk)."""
        read, keys, state = self.encode(points)
        return self.step(read, keys, F.pad(answer.clamp(min=0), (1, 0)), state)[0]

    def encode(self, points: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """What the decoder reads and what it points at, ``[B, N + 1, hidden]`` each, and its first state."""
        read = self.embed(points)
        keys, state = self.encoder(read)
        end = self.end.expand(len(points), 1, -1)
        return torch.cat([end, read], 1), torch.cat([end, keys], 1), state

    def step(
        self, read: Tensor, keys: Tensor, last: Tensor, state: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Logits after each of ``last [B, n]`` and the new state."""
        out, state = self.decoder(read.gather(1, last[..., None].expand(-1, -1, read.shape[-1])), state)
        logits = self.pointing.logits(out, keys)
        if self.table is not None:
            logits = self.table(torch.cat([out, logits.softmax(-1) @ keys], -1))
        return logits, state

    @torch.no_grad()
    def solve(self, points: Tensor, most: int, *, tour: bool = False) -> Tensor:
        """The likeliest answers, one after the other: ``[B, most]``, 0 from the end on. ``tour``: all points once."""
        read, keys, state = self.encode(points)
        last = torch.zeros(len(points), 1, dtype=torch.long, device=points.device)
        ended, said = torch.zeros_like(last, dtype=torch.bool), torch.zeros_like(keys[..., 0], dtype=torch.bool)
        found = []
        for _ in range(most):
            logits, state = self.step(read, keys, last, state)
            if tour:
                said[:, 0] = True
                logits = logits.masked_fill(said[:, None], -torch.inf)
            last = logits[..., : keys.shape[1]].argmax(-1)
            ended |= last == 0
            last = last.masked_fill(ended, 0)
            said.scatter_(1, last, True)
            found.append(last)
        return torch.cat(found, 1)
