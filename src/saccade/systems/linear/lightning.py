"""Lightning Attention in TNL's block: linear attention that forgets, computed by blocks, at one speed for any length.

    q, k, v = silu(x Wq), silu(x Wk), silu(x Wv)
    S[t]    = exp(log_decay[h]) S[t-1] + k[t] v[t]',   o[t] = q[t]' S[t]
    y       = (layer_norm(o, heads side by side) * sigmoid(x Wa Wb)) Wo,   Wa: width -> D, Wb: D -> width

No scale and no sum of weights to divide by: the norm takes their place. ``log_decay`` is ALiBi's slope, less from layer
to layer (:func:`._lightning.log_decays`). Inside a block scores are computed, between blocks the state is handed on, so
there is no cumulative sum over tokens.

Paper: Various Lengths, Constant Speed: Efficient Language Modeling with Lightning Attention, arXiv:2405.17381
Code: https://github.com/OpenNLPLab/lightning-attention (examples/module/tnl_attn.py: TnlAttention)

Differs: the engine's blocks have 64 tokens on a CPU; the kernel's size is a setting of its GPU. The layer stands in the
backbone's own blocks; TNL's gated perceptron and the rotation of its first layer, which the official module leaves out
too, are not here (`transnormerllm` has the rotation).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.linear import LinearAttention
from ...core.masks import Causal
from ...core.spec import Attention
from ...nn import MultiHead
from ...nn.backbones import Place
from ...nn.gates import OutputGate
from ..base import ClaimNumbers, LayerSystem, Promises
from ._lightning import both_ways, even, log_decays, paces, said

WIDTH, HEADS = 128, 2
TOKENS = 2**16  # of every sample of a pace, in sequences of
LENGTHS = 1024, 8192, 65536
BESIDE_DENSE = 4096  # tokens, all in one sequence: where the authors' table has both kernels take as long, both ways


class Lightning(LayerSystem):
    """No settings."""

    slug = "lightning"
    title = "Lightning Attention (TNL)"
    paper = "https://arxiv.org/abs/2405.17381"
    code = "https://github.com/OpenNLPLab/lightning-attention"
    promises = Promises(cross=False, exponent=1.0, nonnegative=False, hosts=())

    def layer(self, place: Place) -> nn.Module:
        """TNL's attention; the backbone's positions are not used, the decay tells them."""
        return TNLAttention(place)

    def claim(self) -> ClaimNumbers:
        """Training speed of the layer at 1k to 64k on equally many tokens, and beside softmax attention."""
        pace = paces(_training(self.layer), LENGTHS)
        beside = _beside_dense(self.layer)
        return ClaimNumbers.decide(
            {"pace": {str(n): x for n, x in pace.items()}, f"speed_over_dense_at_{BESIDE_DENSE}": round(beside, 3)},
            f"Forward and backward of a layer ({HEADS} heads of {WIDTH // HEADS}) over {TOKENS} tokens, tokens per"
            f" second relative to sequences of {LENGTHS[0]}: {said(pace)}. On one sequence of {BESIDE_DENSE} it is"
            f" {beside:.2f} times as fast as a layer of softmax attention.",
            constant_speed=even(pace),
            faster_than_dense=beside > 1,
        )


class TNLAttention(MultiHead):
    """The layer of this place."""

    def __init__(self, place: Place):
        width, inner = place.width, place.width // place.heads
        low_rank = nn.Sequential(nn.Linear(width, inner, bias=False), nn.Linear(inner, width, bias=False))
        super().__init__(
            LinearAttention(decay=log_decays(place.heads, place.index, place.layers)),
            width,
            place.heads,
            kv_heads=place.kv_heads,
            gate=OutputGate(low_rank, norm=nn.LayerNorm(width)),
        )

    def project(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """SiLU on queries, keys and values."""
        q, k, v = super().project(x, context)
        return F.silu(q), F.silu(k), F.silu(v)


def _layer(make: Callable[[Place], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Place(WIDTH, HEADS, 0, 2, None, None).filled(make)


def _training(make: Callable[[Place], nn.Module], tokens: int = TOKENS) -> Callable[[int], Callable[[], Any]]:
    """From a length to a training pass over so many tokens in sequences of it."""
    layer = _layer(make)
    leaves = list(layer.parameters())
    stream = torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(1))
    return lambda length: both_ways(lambda: layer(stream.view(-1, length, WIDTH)), leaves)


def _beside_dense(make: Callable[[Place], nn.Module]) -> float:
    """Time of a layer of softmax attention (torch's own kernel) over that of this one, both ways."""
    from ...study.claims import interleaved

    makes = {"ours": make, "dense": lambda place: _Dense(Attention(mask=Causal()), place.width, place.heads)}
    work = {name: _training(make, BESIDE_DENSE)(BESIDE_DENSE) for name, make in makes.items()}
    return interleaved(work, 5).ratio("dense", "ours")


class _Dense(MultiHead):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, **given: Any) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
