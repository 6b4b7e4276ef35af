"""Queries and keys sorted by a hash: blocks that meet are attended to, keys drawn at random speak for the others."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...core.masks import Mask
from ...core.tile import At
from ._merged import Found, exact, merge
from ._sorted import cut, take


class Elsewhere(Mask):
    """Sampled keys outside the block of the query: ``home`` ``[B, H, S]`` is their block, ``rows`` its queries."""

    home: Tensor

    def __init__(self, home: Tensor, rows: int):
        super().__init__()
        self.rows = rows
        self.hold("home", home)

    def visible(self, at: At) -> Tensor:
        return self.home[at.b, at.h, at.k] != at.q // self.rows


@dataclass
class HashedBlocks:
    """``planes`` ``[D, r]`` of the hash, keys per ``block``, ``samples`` of the others, drawn from ``source``.

    Fewer queries than ``shortest`` run exact.
    """

    planes: Tensor
    block: int = 256
    samples: int = 256
    shortest: int = 4096
    source: torch.Generator = field(default_factory=torch.Generator)

    def hash(self, x: Tensor) -> Tensor:
        """Bucket of each vector, ``[..., N]``."""
        bits = (x @ self.planes.to(x)) > 0
        code = (bits << torch.arange(bits.shape[-1], device=x.device)).sum(-1)
        return code ^ (code >> 1)

    def unmasked(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Found:
        """Every query to every key."""
        (batch, heads, n, _), m = q.shape, k.shape[2]
        if n < self.shortest:
            return exact(q, k, v, scale)
        order, key_order = (self.hash(x).argsort(dim=-1, stable=True) for x in (q, k))
        q, k, v = take(q, order), take(k, key_order), take(v, key_order)
        count = -(-m // self.block)
        rows = -(-(n + -n % self.block) // count)  # of queries in a block: as many as keys where n is m
        real = None if m % self.block == 0 else lambda b, h, q, k: h * self.block + k < m
        blocks = cut(q, count, rows), cut(k, count, self.block), cut(v, count, self.block)
        out, lse = exact(*blocks, scale, real)
        near = out.reshape(batch, heads, -1, v.shape[-1])[:, :, :n], lse.reshape(batch, heads, -1)[..., :n]
        found = near
        if self.samples and n > rows and m > self.block:
            drawn = torch.randint(m, (batch, heads, self.samples), generator=self.source).to(q.device)
            far, lse = exact(q, take(k, drawn), take(v, drawn), scale, Elsewhere(drawn // self.block, rows))
            found = merge(near, (far, lse + math.log(m / self.samples)))
        back = order.argsort(-1)
        return take(found[0], back), found[1].gather(2, back)
