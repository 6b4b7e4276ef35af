"""Lightning Attention-2: causal linear attention in tiles, quadratic within a tile and by a state between tiles.

    o[t] = norm(sum over s <= t of exp(-slope[h] (t - s)) (q[t] . k[s]) v[s])

    for each tile of B tokens:  within  = ((Q K') * M) V,      M[t, s] = exp(-slope (t - s)) for s <= t, else 0
                                between = diag(exp(-slope t)) Q S
                                S       = exp(-slope B) S + (diag(exp(-slope (B - t))) K)' V

so time is linear and the tiles fit the fast memory, in the forward pass and in the backward pass, where the same is
done from the last tile to the first. ``norm``: of the heads side by side, without a weight.

Paper: Lightning Attention-2: A Free Lunch for Handling Unlimited Sequence Lengths in Large Language Models,
arXiv:2401.04658
Code: https://github.com/OpenNLPLab/lightning-attention (lightning_attn/ops/triton/lightning_attn2.py,
    lightning_attn2_no_decay.py; the definition in ops/torch/linear_attention.py; slopes in utils/utils.py)

Differs: the official code is for GPUs; the engine's tiles run wherever torch does, and its backward pass recomputes a
stretch of tiles from the state before it. The official function neither projects nor normalizes: the layer here adds
projections and the norm that the paper's equation 1 has around it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.linear import LinearAttention, linear_attention
from ...nn import MultiHead
from ...nn.attention import join, split
from ...nn.backbones import Place
from ..base import ClaimNumbers, LayerSystem, Promises
from ._lightning import SimpleRMSNorm, both_ways, even, log_decays, paces, said

WIDTH = 64
TOKENS = 2**18  # times heads, of every sample of a pace, in sequences of
LENGTHS = 1024, 16384, 262144
CROSSED = {"forward": 4096, "both ways": 8192}  # tokens by which the authors' table has passed FlashAttention-2


class Lightning2(LayerSystem):
    """Settings: ``decay``; without it nothing is forgotten."""

    slug = "lightning-2"
    title = "Lightning Attention-2"
    paper = "https://arxiv.org/abs/2401.04658"
    code = "https://github.com/OpenNLPLab/lightning-attention"
    promises = Promises(cross=False, exponent=1.0, nonnegative=False, hosts=())

    def __init__(self, decay: bool = True):
        self.decay = decay

    def program(self, heads: int) -> LinearAttention:
        """The official function, with the slopes of its examples."""
        return LinearAttention(decay=log_decays(heads) if self.decay else None)

    def layer(self, place: Place) -> nn.Module:
        """Projections, the program, the norm."""
        return MultiHead(
            self.program(place.heads),
            place.width,
            place.heads,
            kv_heads=place.kv_heads,
            positions=place.positions,
            gate=MergedNorm(),
        )

    def claim(self) -> ClaimNumbers:
        """Speed at lengths from 1k to 256k on equally many tokens, forward and both ways, and beside softmax."""
        spec = self.program(1)
        pace = {way: paces(partial(_work, _ours(spec), way, TOKENS), LENGTHS, 3) for way in CROSSED}
        beside = {way: _beside_dense(spec, way, n) for way, n in CROSSED.items()}
        return ClaimNumbers.decide(
            {f"pace {way}": {str(n): x for n, x in found.items()} for way, found in pace.items()}
            | {f"speed over dense {way} at {CROSSED[way]}": round(x, 3) for way, x in beside.items()},
            f"Tokens per second relative to sequences of {LENGTHS[0]}, on {TOKENS} tokens: forward"
            f" {said(pace['forward'])}; both ways {said(pace['both ways'])}. Against torch's softmax attention it is"
            f" {beside['forward']:.2f} times as fast forward at {CROSSED['forward']} tokens and"
            f" {beside['both ways']:.2f} times both ways at {CROSSED['both ways']}.",
            constant_forward=even(pace["forward"]),
            constant_both_ways=even(pace["both ways"]),
            faster_forward=beside["forward"] > 1,
            faster_both_ways=beside["both ways"] > 1,
        )


class MergedNorm(nn.Module):
    """A gate of :class:`MultiHead` that is none: the heads side by side on one scale."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = SimpleRMSNorm()

    def forward(self, out: Tensor, x: Tensor) -> Tensor:
        """``[B, H, N, D]``, as it came."""
        return split(self.norm(join(out)), out.shape[1])


Function = Callable[[Tensor, Tensor, Tensor], Tensor]


def _ours(spec: LinearAttention) -> Function:
    return lambda q, k, v: linear_attention(q, k, v, spec)  # type: ignore[no-any-return]


def _work(function: Function, way: str, tokens: int, length: int) -> Callable[[], Any]:
    """What is timed: so many tokens in sequences of this length, one head."""
    drawn = torch.randn(3, tokens // length, 1, length, WIDTH, generator=torch.Generator().manual_seed(0))
    leaves = [x.requires_grad_(way == "both ways") for x in drawn.unbind(0)]
    forward = partial(function, *leaves)
    return forward if way == "forward" else both_ways(forward, leaves)


def _beside_dense(spec: LinearAttention, way: str, length: int) -> float:
    """Time of torch's softmax attention over that of the tiles, one sequence of one head."""
    from ...study.claims import interleaved

    functions: dict[str, Function] = {
        "ours": _ours(spec),
        "dense": partial(F.scaled_dot_product_attention, is_causal=True),
    }
    return interleaved({name: _work(f, way, length, length) for name, f in functions.items()}, 5).ratio("dense", "ours")
