"""SpAtten: while a model generates, fetch only the tokens, heads and bits of the cache that matter to it.

In a single step, from layer to layer, with all that was summed before (over the prompt, earlier steps and layers):

    weights[h]     = softmax over tokens of q . k, k in its high bits; if max(weights[h]) < threshold, in all its bits
    out[h]         = the greatest of weights[h] times their v; nothing if h is pruned
    token_mass[k] += sum over heads of weights[h, k]                   head_mass[h] += sum of |out[h]|
    tokens, heads  = those of greatest mass among what this layer had: what is pruned stays pruned

Paper: SpAtten: Efficient Sparse Attention Architecture with Cascade Token and Head Pruning, arXiv:2012.09852
Code: https://github.com/mit-han-lab/spatten (workloads/summary-gpt2-medium-wikitext2-*quant.csv: shares, bits, a
    threshold, a whole prompt; RequantDecision.scala; kv_cache_token_pruning.py: half of the kept are the last tokens)

Differs: nothing is evicted, the model's own attention still runs: what the accelerator would fetch in single steps is
counted, against float32. Of grouped keys one is fetched if a head of the group is alive, its low bits if one is unsure,
a value if one wants it. The workload's shares are of 1024 tokens, here of those there are. The paper keeps no token for
being recent; its code for LLMs does (and sums raw scores of the last call, layer by layer, head by head). Each head and
call has one step of quantization; queries stay float. Padding counts. No beam search, no programs of other handles.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice

import torch
from torch import Tensor, nn

from ...core.attend import attention, weights
from ...core.scores import Bias
from ...core.spec import Attention
from ...core.stats import KeyMass
from ...hosts.acts import Call
from ...hosts.handles import listen
from ..base import ClaimNumbers, MethodSystem

Shares = Sequence[tuple[float, float]]  # (from this depth on, keep this share)
REDUCTION, LOST = 10.0, 0.05  # the paper's; accuracy that may be lost and still count as held


class SpAtten(MethodSystem):
    """Settings: shares to keep (``recent``: of these tokens, the last), ``bits`` of a key (high, low) and a value."""

    slug = "spatten"
    title = "SpAtten"
    paper = "https://arxiv.org/abs/2012.09852"
    code = "https://github.com/mit-han-lab/spatten"

    def __init__(
        self, tokens: Shares = ((2 / 24, 0.9), (3 / 24, 0.8), (5 / 24, 0.6), (11 / 24, 0.3)), recent: float = 0.5,
        heads: Shares = ((16 / 24, 13 / 16), (22 / 24, 10 / 16)), values: float = 0.3,
        bits: tuple[int, int, int] = (8, 4, 8), threshold: float = 0.05,
    ):  # fmt: skip
        self.tokens, self.recent, self.heads, self.values = tokens, recent, heads, values
        self.bits, self.threshold = bits, threshold

    @contextmanager
    def apply(self, model: nn.Module) -> Iterator[Pruning]:
        """Prune every single step with a cache; the context's ``fetched`` and ``dense`` count bits."""
        pruning = Pruning(self, model)
        with pruning.handle:
            yield pruning

    @torch.no_grad()
    def claim(self) -> ClaimNumbers:
        """As in the official workload, prose of 993 tokens and 31 steps; and the digits of needles, in single steps."""
        from ...study import probes
        from ...worlds import recall, text

        model = probes.embedded()
        worlds = [(text.text(1024, 5), 31), *((recall.needle(length, 5), 4) for length in (512, 1024, 2048))]
        pages = [(torch.stack([e.tokens for e in islice(world, 12)]), count) for world, count in worlds]

        def right(page: Tensor, count: int) -> float:  # of the last tokens, the share that is said one before
            cache = model(page[:, : -count - 1], logits_to_keep=1).past_key_values
            steps = page[:, -count - 1 : -1].split(1, 1)
            said = torch.cat([model(step, past_key_values=cache).logits.argmax(-1) for step in steps], 1)
            return round(float((said == page[:, -count:]).double().mean()), 4)

        dense = [right(*page) for page in pages]
        with self.apply(model) as pruning:
            kept = [right(*page) for page in pages]
        less = pruning.dense / pruning.fetched
        return ClaimNumbers.decide(
            {"reduction": round(less, 3), "right": kept, "right_dense": dense},
            f"A step fetches 1/{less:.1f} of the bits of float32 keys and values; it says {kept[0]:.1%} of bytes right"
            f" in prose (of {dense[0]:.1%}) and {sum(kept[1:]) / 3:.1%} in needles (of {sum(dense[1:]) / 3:.1%}).",
            memory=less >= REDUCTION, accuracy_held=all(a >= b - LOST for a, b in zip(kept, dense, strict=True)),
        )  # fmt: skip


class Pruning:
    """What the running layer may use (``tokens`` ``[B, M]``, ``heads`` ``[B, H]``), the masses, and bits so far."""

    def __init__(self, setting: SpAtten, model: nn.Module):
        self.setting, self.fetched, self.dense, self.token_mass, self.head_mass = setting, 0, 0, *torch.zeros(2, 0, 0)
        self.handle = listen(model, self.hear)

    @torch.no_grad()
    def hear(self, call: Call) -> None:
        """After a layer's own attention: attend as the accelerator does, in its place, and prune for the next layer."""
        q, frame, setting, (high, low, bits) = call.q, call.frame, self.setting, self.setting.bits
        (batch, heads, new, _), (_, groups, length, width) = q.shape, call.v.shape
        depth = (self.handle.sites.index(call.site) + 1) / len(self.handle.sites)  # of the layer after this
        if call.site is self.handle.sites[0]:
            self.tokens, self.heads = q.new_ones(batch, length).bool(), q.new_ones(batch, heads).bool()
            if self.token_mass.shape != (batch, frame.offset):  # another text
                self.token_mass, self.head_mass = q.new_zeros(batch, frame.offset), q.new_zeros(())
            self.token_mass = torch.cat([self.token_mass, q.new_zeros(batch, new)], 1)
        k, v = quantize(call.k, high + low), quantize(call.v, bits)
        if new > 1:
            out, told = attention(q, k, v, frame.combine(Attention()), stats=[KeyMass()], offset=frame.offset)
        else:
            alive = self.tokens[:, None] & self.heads[..., None]
            spec = frame.combine(Attention(score=Bias(torch.where(alive, 0.0, -torch.inf)[:, :, None])))
            coarse = quantize(call.k, high + low, low)
            surest = weights(q, coarse, spec, offset=frame.offset).amax(-1)[..., 0]
            again = (self.heads & (surest < setting.threshold)).unflatten(1, (groups, -1)).any(2)
            weight = weights(q, torch.where(again[..., None, None], k, coarse), spec, offset=frame.offset)
            told = {"key_mass": weight.sum(2)}
            best = weight.topk(math.ceil(setting.values * int(self.tokens[0].sum())), -1)
            weight = torch.zeros_like(weight).scatter(-1, best.indices, best.values)
            out = weight @ v.repeat_interleave(heads // groups, 1)
            read, wanted = (x.unflatten(1, (groups, -1)).any(2).sum(-1) for x in (alive, weight[:, :, 0] > 0))
            self.fetched += int((read * (high + low * again) * k.shape[-1] + wanted * bits * width).sum())
            self.dense += 32 * (k.numel() + v.numel())
        call.out.copy_(out)
        self.token_mass = self.token_mass + told["key_mass"].sum(1)
        self.head_mass = self.head_mass + out.abs().sum((2, 3))
        if new == 1:
            self.tokens = top(self.token_mass, self.tokens, setting.tokens, depth, setting.recent)
            self.heads = top(self.head_mass, self.heads, setting.heads, depth)


def top(mass: Tensor, alive: Tensor, shares: Shares, depth: float, recent: float = 0.0) -> Tensor:
    """Of those alive ``[B, M]`` the share for this depth (0: first layer, 1: past the last), last and greatest mass."""
    count = math.ceil(mass.shape[1] * min((share for start, share in shares if start <= depth), default=1.0))
    ranked = mass.masked_fill(~alive, -torch.inf)
    ranked[:, mass.shape[1] - math.ceil(count * recent) :] = torch.inf
    return torch.zeros_like(alive).scatter(1, ranked.topk(count, -1).indices, True) & alive


def quantize(x: Tensor, bits: int, dropped: int = 0) -> Tensor:
    """``[..., M, D]`` in so many bits, each head in steps of its own, the lowest ``dropped`` of the bits zero."""
    step = x.abs().amax((-2, -1), keepdim=True).clamp(min=torch.finfo(x.dtype).tiny) / (2 ** (bits - 1) - 1)
    return (x / step).round().div(2**dropped).floor() * 2**dropped * step
