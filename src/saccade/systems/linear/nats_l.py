"""NAtS-L: each block of tokens is remembered by softmax attention or by a gated delta rule, as the layer chooses.

    p        = softmax(Wc mean of the block's x),  chosen = argmax p         per block and head: softmax or linear
    q, k, v  = silu(conv(x W)), shared by both; the linear heads are wide, each is ``split`` softmax heads
    soft[i]  = softmax over j <= i of norm(q[i]) . norm(k[j]) / sqrt(d), j in i's block or in one chosen for softmax
    S        = gated delta rule (decay exp(g), strength beta) of normalized q, k; where a block ends that was chosen for
               softmax, S becomes what it was before the block, decayed as long
    y        = (norm(S' q) * s0 + norm(soft) * s1) * silu(x Wg) Wo,          s = softmax(q Ws) per softmax head

The choice is learned from the loss alone: p gets the gradient of a factor on ``exp(score)`` of later blocks' queries,
and of one on what the block leaves in S, each where it was chosen (straight through).

Paper: Neural Attention Search Linear: Towards Adaptive Token-Level Hybrid Attention Models, arXiv:2602.03681
Code: https://github.com/automl/NeuralAttentionSearchLinear (src/nats/layers/natsl_attn_gdn.py, ops/mixed_ops/
    mixed_attn_gdn.py; settings of experiments/configs/natsl_340M.json)

Differs: blocks have 16 tokens unless told (official: 64, its kernel's). The official models put this layer in every
fourth place and gated DeltaNet in the others; here the backbone decides. A decoding step computes its block anew, and
the cache drops a block that no head of any sequence keeps for softmax (the official one drops it head by head).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core import masks, scores
from ...core.attend import attention
from ...core.errors import SpecError, Unsupported
from ...core.linear.forms import decay_of
from ...core.spec import Attention
from ...core.tile import At
from ...nn import KVCache
from ...nn.attention import split as by_heads
from ...nn.backbones import Place
from ...worlds.batches import IGNORED
from ..base import ClaimNumbers, LayerSystem, Promises

REACH = 4  # tokens of the short convolution
MIXED = 0.05  # "mixed": both kinds are chosen for at least this share of the blocks
SYMBOLS, WIDTH, HEADS, BLOCK = 16, 64, 4, 8  # of the claim: a state has keys of 12, and there are 16 to be recalled


class NatsL(LayerSystem):
    """Settings: ``block``, tokens that are chosen for together; ``split``, softmax heads of a linear head."""

    slug = "nats-l"
    title = "NAtS-L (token-level hybrid attention)"
    paper = "https://arxiv.org/abs/2602.03681"
    code = "https://github.com/automl/NeuralAttentionSearchLinear"
    promises = Promises(cross=False, nonnegative=False, hosts=())

    def __init__(self, block: int = 16, split: int = 2):
        self.block, self.split = block, split

    def layer(self, place: Place) -> nn.Module:
        """The layer; positions of the backbone are not used (as in the official models)."""
        return TokenHybrid(place, self.block, self.split)

    def claim(self) -> ClaimNumbers:
        """What is recalled beside linear attention alone, whose state is too small for it; and what is chosen."""
        from ...study.trainer import Recipe, Task, accuracy, compete, labelled

        kinds = {"linear": _LinearAlone, "nats-l": TokenHybrid}
        result = compete(
            {name: partial(_reader, kind) for name, kind in kinds.items()},
            Task(recall, labelled, lambda: islice(recall(10_000), 8), accuracy, "accuracy"),
            Recipe(steps=400, lr=2e-2, seeds=(0, 1)),
        )
        gain = result.excess("nats-l", "linear")
        shares = [soft_share(model, next(recall(20_000))[0]) for model in result.models["nats-l"]]
        share = statistics.fmean(shares)
        return ClaimNumbers.decide(
            result.numbers()
            | {"softmax_share": [round(x, 4) for x in shares], "excess": round(gain.mean, 4)}
            | {"excess_error": round(gain.error, 4)},
            f"Of {SYMBOLS} symbols in a row, said again from another one on, it tells {result.mean('nats-l'):.1%} of"
            f" those that follow (linear attention alone {result.mean('linear'):.1%}), with {share:.0%} of the blocks"
            " remembered by softmax attention.",
            recall_above_linear=gain.mean > 2 * gain.error,
            mixed=MIXED <= share <= 1 - MIXED,
            cost_below_softmax=share < 1,
        )


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
        """What the state gives ``[B, H, n, Dv]``, and the state ``[B, H, D, Dv]`` after the last full block.

        The gated delta rule in chunks (arXiv:2412.06464, section 3.3), a chunk a block, with the choice as a factor on
        what a block leaves behind.
        """
        exact = torch.promote_types(stream.dtype, torch.float32)
        n, full = stream.shape[1], written.shape[2]
        rest = (0, 0, 0, -n % self.block)  # tokens that write nothing and forget nothing
        q, k, v = (F.pad(by_heads(x, self.heads).to(exact), rest).flatten(0, 1) for x in (q, k, v))
        q, k = (x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for x in (q, k))
        beta = F.pad(self.strength(stream).to(exact).sigmoid(), rest).mT.flatten(0, 1)
        g = -self.rate.to(exact).exp() * F.softplus(self.forgetting(stream).to(exact) + self.step.to(exact))
        decay = decay_of(F.pad(g, rest).mT.flatten(0, 1), q, self.block)
        q, k, v, beta = (x.unflatten(1, (-1, self.block)) for x in (q, k, v, beta[..., None]))
        known = torch.cat([v * beta, decay.since_start(k * beta)], -1)
        solved = torch.linalg.solve_triangular(decay.scores(k * beta, k, -1), known, upper=False, unitriangular=True)
        own, held = solved.split([v.shape[-1], k.shape[-1]], -1)
        ends, kept = decay.until_end(k).mT, F.pad(written, (0, 1)).to(exact).flatten(0, 1)[..., None, None]
        now = q.new_zeros(len(q), k.shape[-1], v.shape[-1]) if state is None else state.flatten(0, 1)
        states, writes = [], []
        for block in range(q.shape[1]):
            states.append(now)
            writes.append(own[:, block] - held[:, block] @ now)
            now = decay.carry(now, block) + kept[:, block] * (ends[:, block] @ writes[-1])
        states.append(now)
        out = decay.since_start(q) @ torch.stack(states[:-1], 1) + decay.scores(q, k) @ torch.stack(writes, 1)
        found = (out * q.shape[-1] ** -0.5).flatten(1, 2)[:, :n].unflatten(0, (len(stream), -1))
        return found.to(stream.dtype), states[full].unflatten(0, (len(stream), -1))

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


class Chosen(scores.Score):
    """A factor on ``exp(score)`` of keys in other blocks: 1 where they are seen, so that the choice gets a gradient.

    Args:
        open: ``[B, H, M]``, 1 for keys that later blocks see, else 0.
        old: keys before the first block here; what they belong to is over.
        block: tokens of a block.
    """

    open: Tensor

    def __init__(self, open: Tensor, old: int, block: int):
        super().__init__()
        self.hold("open", open)
        self.old, self.block = old, block

    def own(self, row: Tensor, key: Tensor) -> Tensor:
        """Do they lie in one block?"""
        return (row - self.old) // self.block == (key - self.old) // self.block

    def visible(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """Keys of one's own block, and of those that were chosen."""
        return self.own(q, k) | (self.open.detach()[b, h, k] > 0)

    def forward(self, score: Tensor, at: At) -> Tensor:
        factor = self.open[at.b, at.h, at.k].to(score.dtype)
        return score + (factor - 1).masked_fill(self.own(at.row, at.k), 0)


class _LinearAlone(TokenHybrid):
    """All blocks are chosen for the state; softmax attention sees its own block."""

    def choices(self, stream: Tensor) -> Tensor:
        return torch.zeros_like(super().choices(stream)) + torch.tensor([0, 1], device=stream.device)


def _reader(kind: type[TokenHybrid]) -> nn.Module:
    from ...nn import GPT

    place = Place(WIDTH, HEADS, 0, 1, None, None)
    return GPT(SYMBOLS, WIDTH, 1, HEADS, attention=lambda layer, heads: kind(place, BLOCK, split=2))


def recall(seed: int, batch: int = 16) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of all symbols in a random order, and again in that order from a random one on: each but the
    last is to be told from the one before it."""
    source = torch.Generator().manual_seed(seed)
    while True:
        first = torch.rand(batch, SYMBOLS, generator=source).argsort(1)
        turn = (torch.arange(SYMBOLS) + torch.randint(SYMBOLS, (batch, 1), generator=source)) % SYMBOLS
        tokens = torch.cat([first, first.gather(1, turn)], 1)
        labels = tokens[:, 1:].clone()
        labels[:, :SYMBOLS] = IGNORED
        yield tokens[:, :-1], labels


@torch.no_grad()
def soft_share(model: Any, tokens: Tensor) -> float:
    """Share of the full blocks, over sequences, layers and heads, that are chosen for softmax attention."""
    x, found = model.embed(tokens), []
    for block in model.stack.blocks:
        found.append(float(block.attention.choices(block.before(x))[..., 0].mean()))
        x = block(x)
    return statistics.fmean(found)
