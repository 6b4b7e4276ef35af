"""Where a text is cut into chunks: labels from attention, a network that learns them from keys alone, and its lessons.

Paper, code and equations are in :mod:`.dhsa`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.attend import weights
from ...core.masks import Causal
from ...core.spec import Attention
from ...hosts.acts import Call
from ...hosts.handles import listen

WINDOW, THETA, APART, PER_BLOCK = 4, 1.1, 8, 8  # keys on a side of a gap; least score; gap of cuts; cuts per block


class Boundaries(nn.Module):
    """Which gaps are cuts, from keys ``[B, Hkv, M, D]``: logits ``[B, M]``, of the gap behind each key.

    Args:
        channels: ``Hkv * D``.
        heads, hidden: of its attention within ``2 * WINDOW`` keys, and width of its last layer but one.
    """

    def __init__(self, channels: int, heads: int = 4, hidden: int = 256):
        super().__init__()
        self.mix = nn.MultiheadAttention(channels, heads, batch_first=True)
        self.norm = nn.LayerNorm(channels)
        self.judge = nn.Sequential(nn.Linear(4 * channels + 1, hidden), nn.ReLU(), nn.Linear(hidden, 1))

    def forward(self, k: Tensor) -> Tensor:
        x = F.pad(k.float().transpose(1, 2).flatten(2).mT, (WINDOW - 1, WINDOW)).unfold(2, 2 * WINDOW, 1)
        x = x.permute(0, 2, 3, 1).flatten(0, 1)
        x = self.norm(self.mix(x, x, x, need_weights=False)[0]).unflatten(0, (len(k), -1))
        a, b = x[:, :, :WINDOW].mean(2), x[:, :, WINDOW:].mean(2)
        alike = F.cosine_similarity(a, b, dim=-1, eps=1e-6)[..., None]
        return self.judge(torch.cat([a, b, (a - b).abs(), a * b, alike], -1))[..., 0]


class Even(nn.Module):
    """A predictor that cuts every ``size`` keys: chunks are blocks then, and this the official baseline."""

    def __init__(self, size: int):
        super().__init__()
        self.size = size

    def forward(self, k: Tensor) -> Tensor:
        behind = torch.arange(1, k.shape[2] + 1, device=k.device)
        return torch.where(behind % self.size == 0, 100.0, -100.0).repeat(len(k), 1)


@torch.no_grad()
def ratio(w: Tensor) -> Tensor:
    """The official labels: of every gap behind a key ``[B, M]``, from weights ``[B, M, M]``; 0 near both ends."""
    m = w.shape[-1]
    mass = F.pad(w.double().flip(1).cumsum(1).flip(1).cumsum(2), (1, 0))  # of the rows from here, the keys before
    found = mass.new_zeros(w.shape[:2])
    c = torch.arange(2 * WINDOW - 1, m - 2 * WINDOW, device=w.device)
    if len(c):
        low, middle, high = (mass[:, c + WINDOW, c + 1 + shift] for shift in (-WINDOW, 0, WINDOW))
        past, future = middle - low + 1e-6, high - middle + 1e-6
        found[:, c] = torch.maximum(past, future) / torch.minimum(past, future)
    return found


def own_ratio(q: Tensor, k: Tensor) -> Tensor:
    """:func:`ratio` of causal attention, of every gap behind a key ``[B, M]``; queries are the last of M positions."""
    w = weights(q, k, Attention(mask=Causal())).mean(1)
    return ratio(F.pad(w, (0, 0, k.shape[2] - q.shape[2], 0)))


def starts(score: Tensor, most: int) -> Tensor:
    """Where chunks start, bool ``[B, M]``, from the scores ``[B, M]`` of the gaps behind the keys."""
    found = []
    for row in score.tolist():
        cut, free = [True] + [False] * (len(row) - 1), [True] * len(row)
        for i in sorted((i for i, s in enumerate(row[:-1]) if s > THETA), key=lambda i: -row[i]):
            if free[i] and sum(cut) <= most:
                cut[i + 1] = True
                near = range(max(0, i - APART), min(len(row), i + APART + 1))
                for j in near:
                    free[j] = False
        found.append(cut)
    return torch.tensor(found, device=score.device)


def teach(model: Any, tokens: Tensor, steps: int = 80, lr: float = 1e-3, seed: int = 0) -> Boundaries:
    """One predictor for all layers of a model, from its attention on texts ``[T, N]``, by the official loss.

    That is focal cross entropy (gamma 2, of cuts 1.3 fold) on ``ratio >= 2``; a step is one text, all layers. The
    official rate, 1e-4, is for thousands of texts.
    """
    seen: list[list[tuple[Tensor, Tensor]]] = []

    def hear(call: Call) -> None:
        seen[-1].append((call.k, (own_ratio(call.q, call.k) >= 2).float()))

    with torch.no_grad(), listen(model, hear):
        for one in tokens.split(1):
            seen.append([])
            model(one, use_cache=False, logits_to_keep=1)
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(seed)
        predictor = Boundaries(seen[0][0][0].shape[1] * seen[0][0][0].shape[3])
        optimizer = torch.optim.Adam(predictor.parameters(), lr)
        inner = slice(2 * WINDOW - 1, -2 * WINDOW)
        for step in range(steps):
            optimizer.zero_grad()
            for k, cut in seen[step % len(seen)]:
                logits, aim = predictor(k)[:, inner], cut[:, inner]
                missed = (logits.sigmoid() - aim).abs()
                loss = F.binary_cross_entropy_with_logits(logits, aim, pos_weight=aim.new_tensor(1.3), reduction="none")
                (missed.square() * loss).mean().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return predictor.requires_grad_(False)
