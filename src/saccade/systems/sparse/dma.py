"""Dynamic mask attention: values say how important their tokens are, and a query reads the ``window`` greatest so far.

    bias[j]  = exp(A * softplus(dt(v[j])))            of each value head; dt reads the values of all of them
    w[i]     = softmax(q[i] . k / sqrt(D) + bias)     over the ``window`` keys j <= i of greatest bias[j]

A key's bias is the same for all queries. So a key that is not among the greatest never is again, and what a row sees
is a threshold: the ``window``-th greatest bias up to there. Nothing is N x N, and blocks below it are skipped. Which
keys are kept has no gradient; A and dt learn from the bias of those that are.

Paper: Trainable Dynamic Mask Sparse Attention, arXiv:2508.02124
Code: https://github.com/SmallDoges/flash-dmattn (examples/modeling/modeling_doge.py, flash_sparse_attn/utils/mask.py:
    topk_mask), and transformers' DogeAttention, which keeps the paper's exp

Differs: of equal biases the newest is kept (there: whichever torch.topk names); a word's values are equal in a first
layer without positions in them. The cache holds biases; the official code computes them anew from the cached values.
The official repository has since dropped the exp, which keeps the same keys, for numerical stability; here it is as in
the paper. Its smoothing of the mask by blocks and the Doge model's norms of queries and keys are left out. The claim
judges one layer behind a short convolution, on questions at any distance: with two layers of attention not even full
attention learned the task in the time there is, and Zoology's own law of distances leaves most answers in the window.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core import masks
from ...core.attend import attention
from ...core.errors import SpecError
from ...core.scores import Bias
from ...core.spec import Attention
from ...nn.attention import AnyCache, KVCache, MultiHead, grouped, join
from ...nn.backbones import GPT, Place
from ..base import ClaimNumbers, LayerSystem, Promises
from ._greatest_so_far import strongest

LENGTH, PAIRS, KEYS, VOCAB, WIDTH = 32, 4, 12, 40, 32  # of the claim; KEYS: that a query reads
LEAD = 0.05  # accuracy that counts as above


@dataclass
class BiasCache(KVCache):
    """Keys, values and the biases ``[B, G, M]`` of the tokens so far."""

    bias: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all three."""
        return super().nbytes + (0 if self.bias is None else self.bias.nbytes)


class DynamicMask(MultiHead):
    """A MultiHead that masks by the values it reads; ``A`` and ``dt`` are of the value heads."""

    def __init__(self, window: int, place: Place):
        super().__init__(
            Attention(mask=masks.Causal()), place.width, place.heads, kv_heads=place.kv_heads, positions=place.positions
        )
        self.window = window
        self.A = nn.Linear(1, self.value_heads, bias=False)  # a number per head, drawn as the backbone draws weights
        self.dt = nn.Linear(self.value_heads * self.head_width, self.value_heads, bias=False)

    def cache(self) -> BiasCache:
        return BiasCache()

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, cache: AnyCache | None = None, keep: Tensor | None = None,
        **given: Any,
    ) -> Tensor:  # fmt: skip
        bias = torch.exp(self.A.weight * F.softplus(self.dt(join(v))).mT)
        start = 0 if cache is None else cache.length
        if isinstance(cache, BiasCache):
            k, v = cache.append(k, v)
            bias = cache.bias = bias if cache.bias is None else torch.cat([cache.bias, bias], -1)
        mask = self.spec.mask
        if keep is not None:  # padding takes nobody's place
            bias, mask = bias.masked_fill(~keep[:, None], -torch.inf), mask & masks.Padding(keep)
        k, v = grouped(k, v)
        added = Bias(bias.repeat_interleave(self.heads // self.value_heads, 1)[:, :, None])
        return attention(q, k, v, Attention(added, mask & strongest(bias, self.window, start)), offset=start)


class DMA(LayerSystem):
    """Settings: ``window``, keys that a query reads."""

    slug = "dma"
    title = "Trainable dynamic mask sparse attention"
    paper = "https://arxiv.org/abs/2508.02124"
    code = "https://github.com/SmallDoges/flash-dmattn"
    promises = Promises(cross=False, unit_rows=True, hosts=())

    def __init__(self, window: int = 2048):
        self.window = window

    def layer(self, place: Place) -> DynamicMask:
        """Multi-head attention with a dynamic mask. Raises: SpecError for a window below 1."""
        if self.window < 1:
            raise SpecError(f"DMA: window={self.window} must be at least 1, the keys that a query reads")
        return DynamicMask(self.window, place)

    def claim(self) -> ClaimNumbers:
        """Multi-query associative recall far behind the pairs, with as many keys per query as a sliding window has."""
        from ...study.trainer import Recipe, Task, accuracy, compete, labelled
        from ...worlds.mqar import batch, mqar

        def batches(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
            stream = mqar(LENGTH, seed, vocab_size=VOCAB, num_kv_pairs=PAIRS, power_a=1.0, random_non_queries=False)
            while True:
                drawn = batch(stream, 64)
                yield drawn.inputs, drawn.labels

        contestants = {
            "full": partial(_model, Attention(mask=masks.Causal())),
            "window": partial(_model, Attention(mask=masks.Causal() & masks.Window(KEYS))),
            "dma": partial(_model, DMA(KEYS)),
        }
        task = Task(batches, labelled, lambda: islice(batches(999), 8), measure=accuracy, score="accuracy")
        result = compete(contestants, task, Recipe(steps=900, lr=1e-2, seeds=(0,)))
        lead = result.excess("dma", "window").mean
        return ClaimNumbers.decide(
            result.numbers() | {"lead": round(lead, 4)},
            f"Asked for {PAIRS} values anywhere in {LENGTH} tokens, a layer of dynamic mask attention that reads {KEYS}"
            f" keys finds {result.mean('dma'):.0%}, a window of {KEYS} {result.mean('window'):.0%} and full attention"
            f" {result.mean('full'):.0%}.",
            above_the_window=lead >= LEAD,
        )


def _model(what: DMA | Attention) -> nn.Module:
    """Two layers, the first a short gated convolution as in Zoology's models, the second what is judged."""
    from ...study.zoology import BaseConv, ShortConvolution

    class First(BaseConv):
        def forward(self, x: Tensor, **_: Any) -> Tensor:
            return super().forward(x)

    def mixer(layer: int, heads: int) -> nn.Module:
        if layer == 0:
            return First(WIDTH, ShortConvolution(WIDTH))
        return what.layer(Place(WIDTH, heads, layer, 2, None, None)) if isinstance(what, DMA) else what

    return GPT(VOCAB, WIDTH, 2, 2, attention=mixer, positions=None, init="xavier")
