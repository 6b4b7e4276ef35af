"""DiffQKV: few heads of keys, more of values, a wider way to the queries; values of low weight may stay unread.

    q = Wd (silu(Wg x) * Wu x)     "augmented Q", through 1.5 times the width of the stream
    k = x Wk,  v = x Wv            H / 8 and H / 2 heads
    y = concat over heads h of softmax(q[h] . k[h's group] / sqrt(D)) v[h's group], times Wo

Queries cost nothing to cache, and fewer keys do less harm than fewer values.

Paper: Sigma: Differential Rescaling of Query, Key and Value for Efficient Language Models, arXiv:2501.13629 (section 2;
    table 14: 32 query, 4 key and 16 value heads, augmented Q of 3072 for a width of 2048; B.2: the top 100 values)
Code: none official but ``kv_group_sharing`` in the paper's appendix E, which repeats the keys' heads

Differs: of augmented Q the paper tells the inner width, and that it costs what the same widening of the perceptron
costs; so it is a SwiGLU here. A step of decoding reads each key head once, as the authors' FlexHeadFA does (appendix E
copies it); more queries at once go through a copy. ``fetch`` leaves the lesser values out of the sum, renormalizes
nothing, and still reads them. Keys of smaller width (table 2), which Sigma does not use, are left out.
"""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ...core import masks
from ...core.attend import weights
from ...core.edits import Edit
from ...core.errors import SpecError
from ...core.spec import Attention
from ...core.tile import At
from ...nn import KVCache, MultiHead
from ...nn.attention import AnyCache
from ...nn.backbones import Place
from ...nn.swiglu import SwiGLU
from ..base import ClaimNumbers, LayerSystem, Promises
from ._projections import contest, step_times

BYTES = 1 - 0.375  # of the cache of 16 key heads that stays with 4 (section 3.1)
SAVED = 0.2  # of a decoding step's time; the paper measures up to 33% of attention's, and 25% of its kernel's
PARITY = 0.01  # "equal quality": the loss may be greater by this share
FETCHED = 0.01  # and with few values fetched (in the paper, scores fall by 0.6% or less)


class Fetch(Edit):
    """Only the ``count`` greatest weights of each row stay."""

    def __init__(self, count: int):
        super().__init__()
        self.count = count

    def forward(self, weights: Tensor, at: At, visible: Tensor | None) -> Tensor:
        """The tile without its lesser weights."""
        top = weights.topk(min(self.count, weights.shape[-1]), -1)
        return torch.zeros_like(weights).scatter(-1, top.indices, top.values)


class FlexHeads(MultiHead):
    """Multi-head attention whose decoding steps read every head of keys and of values once."""

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, cache: AnyCache | None = None, keep: Tensor | None = None,
        **given: Any,
    ) -> Tensor:  # fmt: skip
        """What the heads read."""
        if q.shape[2] > 1 or not isinstance(cache, KVCache) or not isinstance(self.spec, Attention):
            return super().attend(q, k, v, cache=cache, keep=keep, **given)
        k, v = cache.append(k, v)
        seen = masks.Full() if keep is None else masks.Padding(keep)  # the last token sees every key, so
        rows = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])  # a group's queries can be rows of one head
        w = weights(rows, k, Attention(mask=seen, edits=self.spec.changes), offset=0)
        return (w.reshape(*v.shape[:2], -1, v.shape[2]) @ v).reshape(*q.shape[:3], -1)


class DiffQKV(LayerSystem):
    """Settings: query heads to a head of ``keys`` and of ``values``; ``augment``, inner width of the queries in widths
    of the stream (0: one matrix); ``fetch``, how many values of a row are read (``None``: all); ``causal``."""

    slug = "diffqkv"
    title = "DiffQKV attention (Sigma)"
    paper = "https://arxiv.org/abs/2501.13629"
    promises = Promises(hosts=())

    def __init__(
        self, keys: int = 8, values: int = 2, augment: float = 1.5, fetch: int | None = None, causal: bool = True
    ):
        if keys % values and values % keys:
            raise SpecError(f"diffqkv: of keys={keys} and values={values} one must divide the other")
        if fetch is not None and fetch < 1:
            raise SpecError(f"diffqkv: fetch must be at least 1; got {fetch}")
        self.keys, self.values, self.augment, self.fetch, self.causal = keys, values, augment, fetch, causal

    def layer(self, place: Place) -> FlexHeads:
        """Multi-head attention with its heads of keys and values; at least one of each."""
        mask = masks.Causal() if self.causal else masks.Full()
        spec = Attention(mask=mask, edits=[] if self.fetch is None else [Fetch(self.fetch)])
        kv_heads = max(1, place.heads // self.keys), max(1, place.heads // self.values)
        layer = FlexHeads(spec, place.width, place.heads, kv_heads=kv_heads, positions=place.positions)
        if self.augment:
            layer.q = SwiGLU(place.width, round(self.augment * place.width), place.width)  # type: ignore[assignment]
        return layer

    def claim(self) -> ClaimNumbers:
        """A decoding step behind 4096 tokens and its cache against grouped queries, and small language models."""
        from ...study.trainer import Setup, batches, next_token

        place = Place(1024, 32, 0, 1, None, None)
        grouped = DiffQKV(2, 2, augment=0)
        layers = {"diffqkv": self.layer(place), "gqa": grouped.layer(place)}
        times, nbytes = step_times(layers, place.width, 4096, batch=2)
        held, saved = nbytes["diffqkv"] / nbytes["gqa"], 1 - times.ratio("diffqkv", "gqa")
        setup = Setup(steps=100, heads=8)
        result = contest({"gqa": grouped, "diffqkv": self}, setup)
        excess = result.excess("diffqkv", "gqa")
        changes = []
        tokens = torch.cat(list(islice(batches(setup.validation, setup, 10_000), 2)))
        for model in result.models["diffqkv"]:
            with torch.no_grad():
                before = float(next_token(model, tokens))
                for layer in model.attentions:
                    layer.spec.edits.append(Fetch(setup.context // 8))
                changes.append(float(next_token(model, tokens)) / before - 1)
        return ClaimNumbers.decide(
            result.numbers()
            | {"cache_share": held, "step_time_saved": round(saved, 3), "excess_loss": round(excess.mean, 4),
               "excess_error": round(excess.error, 4), "fetched_loss_change": [round(x, 4) for x in changes]},
            f"Of a grouped cache with equal heads {held:.1%} stay, and a step behind 4096 tokens takes {saved:.0%} less"
            f" time. A small model's loss differs by {excess.mean:+.4f} nats per byte (standard error"
            f" {excess.error:.4f}) from {result.mean('gqa'):.4f}; with the top {setup.context // 8} values of"
            f" {setup.context}, it changes by {max(changes, key=abs):+.2%}.",
            cache_as_counted=held == BYTES,
            faster_step=saved >= SAVED,
            equal_quality=excess.mean <= PARITY * result.mean("gqa"),
            few_values_do=max(changes) <= FETCHED,
        )  # fmt: skip
