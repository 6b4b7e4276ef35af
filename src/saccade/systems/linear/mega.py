"""Mega: one gated attention head over a moving average of the stream, which brings position and nearness.

    m       = ema(x),                                 a damped moving average, see _ema
    z, r    = silu(m Wz), silu(m Wr),                 u = sigmoid(m Wu)
    q, k    = z * gamma_q + beta_q, z * gamma_k + beta_k,      v = silu(x Wv)
    o       = f(q . k / scale + bias(i - j)) v        f: softmax (scale sqrt(D)), or Laplace (scale: keys seen)
    y       = u * (silu(m Wh + (r * o) Wo) - x)       the update that is added to the stream

``bias`` is the product of one learned vector rotated to i and another rotated to j. With ``chunk`` a token attends to
the chunk it is in, at linear cost, and only the average carries further.

Paper: Mega: Moving Average Equipped Gated Attention, arXiv:2209.10655
Code: https://github.com/facebookresearch/mega (fairseq/modules/moving_average_gated_attention.py,
    exponential_moving_average.py, relative_positional_bias.py: RotaryRelativePositionalBias)

Differs: the official layer holds the norm and the residual, and mixes ``out = (1 - u) stream + u h``; here both belong
to the backbone's block, so ``x`` in the update is the normed stream. Its default bias is a table of distances up to a
greatest length; this is its other one, for any length. The kernel is never truncated, the last chunk may be short, and
there is no dropout. Cross-attention (gated_cross_attention.py) and ReLU² are not here.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core import masks, normalizers, scores
from ...core.attend import attention
from ...core.errors import Unsupported
from ...core.spec import Attention
from ...nn import GPT, KVCache
from ...nn.attention import padded
from ...nn.backbones import Place
from ...nn.positions import rotate
from ..base import ClaimNumbers, LayerSystem, Promises
from ._blocks import BlockCache
from ._ema import AverageCache, DampedEMA, forms_apart
from ._laplace import Laplace, keys_seen

STD = 0.02
SAME = 1e-5  # "equals": of the greatest value, float32
WIDER, CHUNK = 80, 32  # of the claim: a Mega layer has more parameters than one of plain attention
LOSS = 0.01  # "minimal quality loss" of chunks: this share of the loss


class Mega(LayerSystem):
    """Settings: ``causal``; ``chunk``, tokens that attend to each other (all if not given); ``laplace`` in place of
    softmax; ``dims`` of the average for each channel."""

    slug = "mega"
    title = "Mega (moving average equipped gated attention)"
    paper = "https://arxiv.org/abs/2209.10655"
    code = "https://github.com/facebookresearch/mega"
    promises = Promises(cross=False, nonnegative=False, hosts=())

    def __init__(self, causal: bool = True, chunk: int | None = None, laplace: bool = False, dims: int = 16):
        self.causal, self.chunk, self.laplace, self.dims = causal, chunk, laplace, dims

    def promised(self) -> Promises:
        """Causal as set; linear with chunks."""
        return replace(super().promised(), exponent=2.0 if self.chunk is None else 1.0)

    def layer(self, place: Place) -> nn.Module:
        """The layer; heads and positions of the backbone are not used."""
        return GatedAttention(place.width, self)

    def claim(self) -> ClaimNumbers:
        """The average in both forms, and prose beside a transformer that has at least as many parameters."""
        from ...study.trainer import Setup, compete, language
        from ...worlds.text import BOS

        gap = forms_apart()
        setup = Setup(steps=100, seeds=(0, 1), context=256, batch=4)
        gpt = partial(GPT, BOS + 1, layers=setup.layers, heads=setup.heads)
        contestants = {
            "softmax": partial(gpt, WIDER),
            "mega": partial(gpt, setup.width, attention=Mega()),
            "mega-chunk": partial(gpt, setup.width, attention=Mega(chunk=CHUNK)),
        }
        result = compete(contestants, language(setup), setup)
        gain, loss = result.excess("mega", "softmax"), result.excess("mega-chunk", "mega")
        return ClaimNumbers.decide(
            result.numbers()
            | {f"parameters_{name}": result.parameters(name) for name in result.scores}
            | {"forms_differ": float(f"{gap:.2g}"), "excess_over_softmax": round(gain.mean, 4)}
            | {"excess_error": round(gain.error, 4), "excess_of_chunks": round(loss.mean, 4)}
            | {"excess_of_chunks_error": round(loss.error, 4)},
            f"The average by convolution and by recurrence differ by {gap:.1e} of the greatest value over 4096 tokens."
            f" On prose of {setup.context} bytes its loss is {gain.mean:+.4f} nats per byte (standard error"
            f" {gain.error:.4f}) against a transformer of {result.parameters('softmax')} parameters (its own"
            f" {result.parameters('mega')}); chunks of {CHUNK} change it by {loss.mean:+.4f}.",
            convolution_is_recurrence=gap <= SAME,
            better_than_transformer=gain.below,
            little_lost_by_chunks=loss.mean <= LOSS * result.mean("mega"),
        )


class GatedAttention(nn.Module):
    """The layer: query and key width a quarter of the stream's, values twice as wide (the official advice)."""

    def __init__(self, width: int, system: Mega):
        super().__init__()
        self.width, self.inner, self.values = width, max(2, width // 4 // 2 * 2), 2 * width
        self.causal, self.chunk, self.laplace = system.causal, system.chunk, system.laplace
        self.average = DampedEMA(width, system.dims, both_ways=not system.causal)
        self.v = nn.Linear(width, self.values)
        self.mixed = nn.Linear(width, 2 * width + self.inner + self.values)
        self.out = nn.Linear(self.values, width)
        self.gamma = nn.Parameter(STD * torch.randn(2, self.inner))
        self.beta = nn.Parameter(torch.zeros(2, self.inner))
        self.places = nn.Parameter(STD * torch.randn(2, self.inner))
        mask: masks.Mask = masks.Causal() if system.causal else masks.Full()
        if system.chunk is not None:
            mask = mask & masks.Blocks(system.chunk)
        self.spec = Attention(scores.Dot(1.0), mask, Laplace() if system.laplace else normalizers.Softmax())

    def cache(self) -> AverageCache:
        """An empty cache."""
        return AverageCache(KVCache() if self.chunk is None else BlockCache(size=self.chunk))

    def forward(self, x: Tensor, *, cache: AverageCache | None = None, keep: Tensor | None = None) -> Tensor:
        """The update of the stream ``[B, N, width]``; with a cache, of tokens after those it holds."""
        if cache is not None and keep is not None:
            raise Unsupported("Mega decodes sequences of one length: a cache and padding do not go together")
        start, state = (0, None) if cache is None else (cache.length, cache.average)
        sizes = [self.width, self.inner, self.values, self.width]
        u, z, r, h = self.mixed(self.average(x, state, keep)).split(sizes, -1)
        q, k = (F.silu(z)[..., None, :] * self.gamma + self.beta).unbind(-2)
        n = x.shape[1]
        q = q / keys_seen(x, start, self.chunk, self.causal, keep) if self.laplace else q * self.inner**-0.5
        here, there = (rotate(place.expand(1, n, -1), start).expand_as(q) for place in self.places)
        q, k = torch.cat([q, here], -1)[:, None], torch.cat([k, there], -1)[:, None]  # the product is score and bias
        v = F.silu(self.v(x))[:, None]
        if cache is not None:
            k, v = cache.seen.append(k, v)
            cache.average, cache.length = self.average.after(x, state), start + n
        spec = self.spec if keep is None else padded(self.spec, keep)
        read = attention(q, k, v, spec, offset=k.shape[2] - n)[:, 0]
        return u.sigmoid() * (F.silu(h + self.out(read * F.silu(r))) - x)
