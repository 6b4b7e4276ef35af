"""NAtS-L's layer: every block of tokens is remembered by softmax attention or by a gated delta rule.

The equations, with these names, are in :mod:`.nats_l`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core import masks, scores
from ...core.attend import attention
from ...core.errors import SpecError, Unsupported
from ...core.spec import Attention
from ...nn import KVCache
from ...nn.attention import split as by_heads
from ...nn.backbones import Place
from ._chosen import Chosen
from ._gated_delta import gated_delta

REACH = 4  # tokens of the short convolution


@dataclass
class HybridCache:
    """What decoding needs: the stream since the last full block (and ``lead`` tokens before it, for the convolution),
    the state there, and keys and values of blocks chosen for softmax, with ``open [B, heads, M]``: which head's."""

    recent: Tensor | None = None
    lead: int = 0
    state: Tensor | None = None
    chosen: KVCache = field(default_factory=KVCache)
    open: Tensor | None = None
    length: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all."""
        return self.chosen.nbytes + sum(x.nbytes for x in (self.recent, self.state, self.open) if x is not None)


class TokenHybrid(nn.Module):
    """The layer of this place: keys three quarters of the stream's width, values twice as wide (official settings)."""

    def __init__(self, place: Place, block: int, split: int):
        super().__init__()
        width, heads = place.width, place.heads
        inner = 3 * width // 4 // heads
        if inner < split or inner % split or block < REACH:
            raise SpecError(
                f"NAtS-L: heads of {inner} (three quarters of {width} / {heads}) must be a multiple of split={split},"
                f" and a block at least {REACH} tokens; got {block}"
            )
        self.heads, self.block, self.split, keys = heads, block, split, inner * heads
        self.q, self.k = (nn.Linear(width, keys, bias=False) for _ in range(2))
        self.v, self.gate = (nn.Linear(width, 2 * keys, bias=False) for _ in range(2))
        self.near = nn.Conv1d(4 * keys, 4 * keys, REACH, groups=4 * keys, bias=False)
        self.forgetting, self.strength = (nn.Linear(width, heads, bias=False) for _ in range(2))
        step = torch.exp(torch.empty(heads).uniform_(math.log(1e-3), math.log(0.1)))
        self.rate = nn.Parameter(torch.empty(heads).uniform_(0, 16).log())
        self.step = nn.Parameter(step + torch.log(-torch.expm1(-step)))  # softplus of it is the step
        self.choose = nn.Linear(width, 2 * heads, bias=False)
        self.share = nn.Linear(keys, 2 * split * heads, bias=False)
        self.q_norm, self.k_norm = (nn.RMSNorm(inner // split, eps=1e-6) for _ in range(2))
        self.linear_norm, self.soft_norm = (nn.RMSNorm(2 * inner // split, eps=1e-6) for _ in range(2))
        self.out = nn.Linear(2 * keys, width, bias=False)

    def cache(self) -> HybridCache:
        """An empty cache."""
        return HybridCache()

    def forward(self, x: Tensor, *, cache: HybridCache | None = None, keep: Tensor | None = None) -> Tensor:
        """``[B, N, width]`` to the same; with a cache, of tokens after those it holds; padding stands at the end."""
        if keep is not None and bool((keep[:, 1:] > keep[:, :-1]).any()):
            raise Unsupported("NAtS-L's blocks are counted from the first token: padding has to stand at the end")
        cache = HybridCache() if cache is None else cache
        n, known = x.shape[1], x if cache.recent is None else torch.cat([cache.recent, x], 1)
        mixed = torch.cat([self.q(known), self.k(known), self.v(known)], -1).mT
        mixed = F.silu(self.near(F.pad(mixed, (REACH - 1, 0)))).mT[:, cache.lead :]  # from the block's first token on
        q, k, v = mixed.split([self.k.out_features, self.k.out_features, self.v.out_features], -1)
        stream = known[:, cache.lead :]
        chosen = self.choices(stream)
        read, state = self._linear(q, k, v, stream, chosen[..., 1], cache.state)
        soft = self._soft(q[:, -n:], k, v, chosen[..., 0], cache)
        share = self.share(q[:, -n:]).unflatten(-1, (-1, 2)).softmax(-1)
        read = read[:, :, -n:].transpose(1, 2).unflatten(-1, (self.split, -1)).flatten(2, 3)
        y = self.linear_norm(read) * share[..., :1] + self.soft_norm(soft.transpose(1, 2)) * share[..., 1:]
        if full := stream.shape[1] // self.block * self.block:
            start = cache.lead + full
            cache.lead, known, cache.state = min(REACH - 1, start), known[:, max(0, start - REACH + 1) :], state
        cache.recent, cache.length = known, cache.length + n
        return self.out(y.flatten(2) * F.silu(self.gate(x)))

    def choices(self, stream: Tensor) -> Tensor:
        """For each full block 1 where it was chosen and else 0, ``[B, H, blocks, 2]``: for softmax, for the state."""
        full = stream.shape[1] // self.block
        blocks = stream[:, : full * self.block].unflatten(1, (full, self.block)).mean(2)
        p = self.choose(blocks).unflatten(-1, (self.heads, 2)).softmax(-1).transpose(1, 2)
        best = F.one_hot(p.argmax(-1), 2).to(p.dtype)
        return best * (1 + p - p.detach())

    def _linear(
        self, q: Tensor, k: Tensor, v: Tensor, stream: Tensor, written: Tensor, state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """What the state gives ``[B, H, n, Dv]``, and the state ``[B, H, D, Dv]`` after the last full block."""
        exact = torch.promote_types(stream.dtype, torch.float32)
        q, k, v = (by_heads(x, self.heads).to(exact) for x in (q, k, v))
        beta = self.strength(stream).to(exact).sigmoid().mT
        g = -self.rate.to(exact).exp() * F.softplus(self.forgetting(stream).to(exact) + self.step.to(exact))
        found, state = gated_delta(q, k, v, beta, g.mT, written.to(exact), state, self.block)
        return found.to(stream.dtype), state

    def _soft(self, q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, cache: HybridCache) -> Tensor:
        """What softmax attention gives ``[B, split * H, n, Dv]``; keys of full blocks go to the cache."""
        q, k, v = (by_heads(x, self.split * self.heads) for x in (q, k, v))
        q, k = self.q_norm(q), self.k_norm(k)
        opened = chosen.repeat_interleave(self.split, 1).repeat_interleave(self.block, 2)
        full, missing = opened.shape[2], k.shape[2] - opened.shape[2]
        ahead = F.pad(opened, (0, missing))  # later blocks never see the one that is not full
        old = cache.chosen.length
        if cache.open is not None:
            ahead = torch.cat([cache.open.to(ahead), ahead], 2)
        worth = opened.detach().unflatten(2, (-1, self.block)).amax((0, 1, 3)).bool().repeat_interleave(self.block)
        keys, values = k, v
        if old:
            assert cache.chosen.k is not None and cache.chosen.v is not None
            keys, values = torch.cat([cache.chosen.k, k], 2), torch.cat([cache.chosen.v, v], 2)
        if full:
            cache.chosen.append(k[:, :, :full][:, :, worth].detach(), v[:, :, :full][:, :, worth].detach())
            cache.open = torch.cat([ahead[:, :, :old], opened[:, :, worth]], 2).detach()
        choice = Chosen(ahead, old, self.block)
        spec = Attention([scores.Dot(), choice], masks.Causal() & choice.visible)
        return attention(q, keys, values, spec, offset=keys.shape[2] - q.shape[2])
