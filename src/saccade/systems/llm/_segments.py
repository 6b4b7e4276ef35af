"""Segments of a prompt that all end at one position, and PINE's scores: each query has the ones that matter nearest."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ...core.scores import Form


def segments(bounds: Sequence[int], n: int) -> Tensor:
    """The segment of each of n tokens, from 1; 0 outside of all."""
    return torch.bucketize(torch.arange(n), torch.tensor(bounds), right=True) % (len(bounds))


def positions_of(bounds: Sequence[int], n: int) -> Tensor:
    """Positions of n tokens: every segment ends where the last one does."""
    p = torch.arange(n)
    for start, stop in pairwise(bounds):
        p[start:stop] += bounds[-1] - stop
    return p


class Nearest(Form):
    """``q . k`` with the segments' keys at the positions that each query gives them.

    Queries and keys become ``1 + segments`` parts wide: the key fills the part of its segment, the query has each part
    turned for its segment. So the engine still sees a dot product.
    """

    def __init__(self, bounds: Sequence[int], rotary: Any, factor: float):
        super().__init__()
        self.bounds, self.factor = bounds, factor
        self._turned = rotary.forward  # not the module itself: it belongs to the model

    def scale(self, width: int) -> float:
        return self.factor

    def turn(self, x: Tensor, by: Tensor) -> Tensor:
        """Vectors ``[B, H, N, D]`` turned by further positions that broadcast to ``[B, H, N]``."""
        by = by.expand(x.shape[:-1])
        cos, sin = (t.unflatten(0, x.shape[:2]) for t in self._turned(x, by.flatten(0, 1)))
        part, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
        one, two = part.chunk(2, -1)
        return torch.cat([part * cos + torch.cat([-two, one], -1) * sin, rest], -1)

    def prepare(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        n, m = q.shape[2], k.shape[2]
        place = positions_of(self.bounds, m).to(q.device)
        inside = slice(self.bounds[0], self.bounds[-1])
        bare = self.turn(k[:, :, inside], -place[inside]).repeat_interleave(q.shape[1] // k.shape[1], 1)
        shift = self.shifts(self.turn(q, -place[m - n :]) @ bare.mT * self.factor, m - n)
        parts = [q, *(self.turn(q, s) for s in shift.unbind(-1))]
        own = torch.nn.functional.one_hot(segments(self.bounds, m), len(parts)).to(k)
        return torch.cat(parts, -1), (own[:, :, None] * k[..., None, :]).flatten(-2)

    def shifts(self, score: Tensor, first: int) -> Tensor:
        """How far each query moves each segment, ``[B, H, N, segments]``.

        Args:
            score: of queries and the segments' keys without RoPE, ``[B, H, N, tokens in segments]``.
            first: the place of query 0 among all tokens.
        """
        score = score.to(torch.promote_types(score.dtype, torch.float32))
        starts = [b - self.bounds[0] for b in self.bounds]
        length = torch.tensor([b - a for a, b in pairwise(starts)], device=score.device)
        mass = torch.stack([score[..., a:b].logsumexp(-1) for a, b in pairwise(starts)], -1)
        importance = mass - length.log()
        for d, (a, b) in enumerate(pairwise(self.bounds)):
            if first == 0:  # tokens of segment d agree on one order
                others = mass[:, :, a:b].index_fill(-1, torch.tensor([d], device=mass.device), -torch.inf)
                agreed = (others - others.logsumexp(-1, keepdim=True)).logsumexp(2, keepdim=True) - length.log()
                agreed[..., d] = torch.inf
                importance[:, :, a:b] = agreed
        order = importance.argsort(dim=-1, descending=True, stable=True)
        taken = length[order]
        return torch.empty_like(order).scatter_(-1, order, taken.cumsum(-1) - taken)
