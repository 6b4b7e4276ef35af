"""Pairs of queries and keys that hashing brings together, round by round, and how to lay them out as blocks.

Before they are sorted by a random projection, both are lengthened to one norm by a coordinate of their own (XBOX+), so
that near means a large product; then they are cut into equally many runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from ...core.masks import Causal, Mask, Window
from ...core.tile import At
from ._sorted import cut, take

Cut = Callable[..., Tensor]
Pairs = tuple[Mask, Cut, Cut, Cut]
"""A mask, how queries and keys are laid out for it, and how results are put back."""


class Fresh(Mask):
    """Pairs of a cluster that count: keys up to ``limit`` ``[B, H, n]``, not together in an earlier round.

    ``place`` ``[B, H, m]`` is where a key stood; ``homes``: clusters of queries and keys in each earlier round.
    """

    def __init__(self, limit: Tensor, place: Tensor, homes: list[tuple[Tensor, Tensor]]):
        super().__init__()
        self.limit, self.place, self.homes = limit, place, homes

    def visible(self, at: At) -> Tensor:
        seen = self.place[at.b, at.h, at.k] <= self.limit[at.b, at.h, at.q]
        for q_home, k_home in self.homes:
            seen = seen & (q_home[at.b, at.h, at.q] != k_home[at.b, at.h, at.k])
        return seen


def orders(q: Tensor, k: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys by each projection ``[D + 2, rounds]``: ``[rounds, B, H, N]``."""
    norms = [x.square().sum(-1, keepdim=True) for x in (q, k)]
    longest = norms[0].amax(-2, keepdim=True) + norms[1].amax(-2, keepdim=True)
    more_q, more_k = ((longest - norm).sqrt() for norm in norms)
    ways = directions.to(q)
    by_q, by_k = q @ ways[:-2] + more_q * ways[-1], k @ ways[:-2] + more_k * ways[-2]
    return by_q.movedim(-1, 0).argsort(-1), by_k.movedim(-1, 0).argsort(-1)


def clusters(q: Tensor, k: Tensor, directions: Tensor, size: int, causal: bool) -> Iterator[Pairs]:
    """The new pairs of each round of :func:`orders`, in clusters of ``size`` keys."""
    (batch, heads, n, _), m = q.shape, k.shape[2]
    count = -(-m // size)
    rows = -(-n // count)
    sorts = [x.detach() for x in orders(q, k, directions)]
    homes = [x.argsort(-1) // of for x, of in zip(sorts, (rows, size), strict=True)]
    place = torch.arange(m, device=q.device).expand(batch, heads, m)
    limit = place[..., :n] if causal else place.new_full((batch, heads, n), m - 1)

    def lay_out(x: Tensor, order: Tensor, size: int, fill: int = 0) -> Tensor:
        return cut(take(x, order), count, size, fill)

    def back(x: Tensor, order: Tensor) -> Tensor:
        return take(x.reshape(batch, heads, count * rows, -1), order.argsort(-1))

    for round, (order, key_order) in enumerate(zip(*sorts, strict=True)):
        here, there = partial(lay_out, order=order, size=rows), partial(lay_out, order=key_order, size=size)
        earlier = [(here(a[..., None])[..., 0], there(b[..., None])[..., 0]) for a, b in zip(*homes, strict=True)]
        mask = Fresh(here(limit[..., None])[..., 0], there(place[..., None], fill=m)[..., 0], earlier[:round])
        yield mask, here, there, partial(back, order=order)


def near(size: int, causal: bool) -> Pairs:
    """A window of ``size`` keys around the query, as pairs that are laid out as they are."""
    window = Window(size // 2 + 1, (size + 1) // 2)
    return window & Causal() if causal else window, _as_it_is, _as_it_is, _as_it_is


def _as_it_is(x: Tensor) -> Tensor:
    return x
