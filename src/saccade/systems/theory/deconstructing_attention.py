"""Attention taken apart: variants that each give up one of its principles, everywhere or in every other layer.

    standard         softmax(Q K' / sqrt(D)) V;   Q, K, V = H Wq, H Wk, H Wv               H: the layer's states
    mlp              down(silu(gate(H)) up(H)), as many parameters                         no mixing of tokens
    approximate      the softmax's exponential as 1 + s + s² / 2 (linear attention)        another form
    non-approximate  softmax over j of (silu(Q) ⊙ K)[j] . 1 / sqrt(D), one for all i       no pairs of tokens
    random-fixed     Q, K = X Wq, X Wk;   X = the same layers on fixed noise               weights do not see the text
    text-fixed       Q, K = X Wq, X Wk;   X = the same layers on a fixed text              weights do not see the text
    static           Q, K = E Wq, E Wk;   E: the embeddings                                weights see no context

A hybrid has the variant in layers 1, 3, 5, ... and standard attention in 2, 4, 6, ...

Paper: Deconstructing Attention: Investigating Design Principles for Effective Language Modeling, arXiv:2510.11602
Code: https://github.com/HUIYINXUE/DeconAttn (not at hand: after the paper's equations 1 to 13)

Differs: the three terms of "approximate" share one denominator, as in Based, which the paper follows; its appendix has
one for each. X and E go through the norm before attention, as H does; the paper is silent. The model around
them is this library's GPT, of 4 layers, on prose in bytes; theirs is Qwen2.5 of 70M parameters and more.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from statistics import fmean
from typing import Literal, get_args

import torch.nn.functional as F
from torch import Tensor, nn

from ...core import masks
from ...core.errors import SpecError
from ...core.linear import LinearAttention
from ...core.linear.features import Taylor2
from ...core.scores import Dot
from ...core.spec import Attention
from ...nn import MultiHead, StateCache
from ...nn.backbones import Place
from ...nn.swiglu import SwiGLU
from ..base import ClaimNumbers, LayerSystem, Promises
from ._elsewhere import SOURCES, Deconstructed, Elsewhere

Variant = Literal["standard", "mlp", "approximate", "non-approximate", "random-fixed", "text-fixed", "static"]


class Gated(SwiGLU):
    """A gated perceptron with as many parameters as attention of this width; tokens do not meet."""

    def __init__(self, width: int):
        super().__init__(width, round(4 * width / 3), width)

    def forward(self, x: Tensor, *, cache: StateCache | None = None, keep: Tensor | None = None) -> Tensor:
        """``[B, N, width]``, each token by itself."""
        if cache is not None:
            cache.length += x.shape[1]
        return super().forward(x)

    def cache(self) -> StateCache:
        """Nothing but a count."""
        return StateCache()


class Unpaired(MultiHead):
    """Keys weigh by themselves: ``softmax over j of sum(silu(q[j]) * k[j]) / sqrt(D)``, the same row for all queries.

    Positions that turn q and k of a token alike leave that product as it is.
    """

    def __init__(self, place: Place):
        super().__init__(Attention(Dot(1.0), masks.Causal()), place.width, place.heads)

    def project(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of one 1, keys of one number."""
        q, k, v = super().project(context, context)
        loudness = (F.silu(q) * k).sum(-1, keepdim=True) * q.shape[-1] ** -0.5
        return q.new_ones(len(x), self.heads, x.shape[1], 1), loudness, v


class DeconstructingAttention(LayerSystem):
    """Settings: ``variant``; ``hybrid``: standard attention in every second layer."""

    slug = "deconstructing-attention"
    title = "Deconstructing attention"
    paper = "https://arxiv.org/abs/2510.11602"
    code = "https://github.com/HUIYINXUE/DeconAttn"
    promises = Promises(cross=False, hosts=())

    def __init__(self, variant: Variant = "non-approximate", hybrid: bool = False):
        if variant not in get_args(Variant):
            raise SpecError(f"deconstructing-attention: variant must be one of {get_args(Variant)}; got {variant!r}")
        self.variant, self.hybrid = variant, hybrid

    def promised(self) -> Promises:
        """Those of another source do not decode."""
        return replace(self.promises, decodes=self.variant not in SOURCES)

    def layer(self, place: Place) -> nn.Module:
        """The variant's, or a program. Fixed and static ones need :meth:`model`; alone they are standard attention."""
        if self.variant == "standard" or (self.hybrid and place.index % 2):
            return Attention(mask=masks.Causal())
        if self.variant == "mlp":
            return Gated(place.width)
        if self.variant == "approximate":
            return LinearAttention(Taylor2(), normalize=True)
        if self.variant == "non-approximate":
            return Unpaired(place)
        return Elsewhere(Attention(mask=masks.Causal()), place.width, place.heads, positions=place.positions)

    def model(self, vocab: int, *sizes: int, text: Tensor) -> Deconstructed:
        """A language model with it: width, layers and heads, and the fixed text int64 ``[length]``."""
        return Deconstructed(vocab, *sizes, system=self, text=text)

    def claim(self) -> ClaimNumbers:
        """Loss on prose of every variant, in all layers and in every second one."""
        from ...study.trainer import Setup, compete, language
        from ...worlds.text import BOS, encode

        setup = Setup(steps=120, context=64, batch=12, seeds=(0,))
        sizes, text = (BOS + 1, setup.width, setup.layers, setup.heads), encode(setup.training[: setup.context])
        standard, *variants = get_args(Variant)
        systems = {standard: DeconstructingAttention(standard)}
        systems |= {name: DeconstructingAttention(name) for name in variants}
        systems |= {f"{name} hybrid": DeconstructingAttention(name, hybrid=True) for name in variants}
        result = compete(
            {name: partial(system.model, *sizes, text=text) for name, system in systems.items()}, language(setup), setup
        )
        alone, hybrid = ({n: result.excess(n + kind, standard).mean for n in variants} for kind in ("", " hybrid"))
        looking = [name for name in variants if name not in ("mlp", "non-approximate")]
        return ClaimNumbers.decide(
            result.numbers(),
            f"Loss on prose is {result.mean(standard):.3f} nats per byte; by variant, in all layers and every second:"
            f" {', '.join(f'{name} {alone[name]:+.3f}, {hybrid[name]:+.3f}' for name in variants)}.",
            standard_is_best_of_uniform=min(alone.values()) > 0,
            approximate_is_next=alone["approximate"] == min(alone.values()),
            mixing_is_indispensable=alone["mlp"] > max(alone[name] for name in looking),
            hybrids_recover=fmean(hybrid.values()) <= fmean(alone.values()) / 2,
        )
