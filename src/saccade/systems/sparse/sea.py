"""SEA: a small learned network draws a narrow picture of the attention matrix; attention is exact where it is bright.

    seen    = causal linear attention of phi(q) to phi(k), the values being a learned place and v
    state   = GELU(LayerNorm(Linear(seen, v)));   a row of the picture from it, then two convolutions over rows and
              columns that mix the heads and look up only:   picture[h, i, p], p < length
    pixel(i, j)  = floor((j + 1/2) / (i + 1) * length): every row's keys, however many, are stretched over the picture
    mask[h, i, j] = pixel(i, j) is among the heads * keep * length / (i + 1) brightest of row i, heads together
    near    = softmax attention of q[i] under the mask;   mean = the mean of v up to i
    out     = a s near + (1 - a) mean,   a and s sigmoids of the state

About ``keep`` keys per query and head are read, in work and memory linear in the text as long as a pixel is no wider
than heads * keep keys (a row reads at least one). The picture stretched back
(``Estimator.map`` in _picture.py) is the estimated attention matrix, which the teacher's is distilled into.

Paper: SEA: Sparse Linear Attention with Estimated Attention Mask, arXiv:2310.01777
Code: https://github.com/gmlwns2000/sea-attention (src/models/perlin_attention/attention.py, the causal branch, with
    modules.py and ops/kernels/resize_m_to_t.py); scripts/opt.py: k 64, predictor length 256, features D ln D / 8

A MethodSystem and not a program, for the picture needs the values. ``distill`` in _picture_lessons.py fits the
estimators to a model's own attention, ``apply`` puts them in its place for whole prompts.

Differs: causal language models alone (official: a second network for encoders). Calls with a cache that is not empty,
or with padding, run exact (official: a state of sums and of the convolutions' last rows). Features are drawn once
(official: anew every 1000 steps). Estimators are trained layer by layer with the losses of the official attention
module; the model stays as it is, so its LoRA and the losses on the model's output are left out, as are ``k_oversample``
(1 by default) and the jitter of a tenth of the training steps.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...core.errors import SpecError
from ...core.masks import Causal, Window
from ...core.spec import Attention
from ...hosts.replaced import read
from ..base import ClaimNumbers, MethodSystem, Promises
from ._listed_keys import gathered
from ._picture import SHRINK, Estimator
from ._whole_prompts import on_whole_prompts

SIZE, KEEP, STEPS = 256, 8, 120  # of the claim: bytes of a text, keys read per query and head, texts to learn from
NEAR = 1.1  # perplexity may be so many times the dense one's


def attend(estimator: Estimator, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """SEA of ``[B, H, N, D]``, keys and values ``[B, Hkv, N, D]``."""
    q = q * (q.shape[-1] ** -0.5 if scale is None else scale)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores, shares = estimator(q, k, v)
    near = gathered(q, k, v, estimator.keys(estimator.bright(scores)))
    return blend(near, v, shares)


def blend(near: Tensor, v: Tensor, shares: Tensor) -> Tensor:
    """``a s near + (1 - a) mean`` of ``[B, H, N, D]``, the shares ``[B, H, N, 2]``."""
    mean = v.cumsum(2) / torch.arange(1, v.shape[2] + 1, device=v.device)[:, None]
    return torch.lerp(mean, near * shares[..., :1], shares[..., 1:])


class Sea(MethodSystem):
    """Settings: ``keep`` keys per query and head, ``length`` of the picture, ``context``, ``narrow``, ``seed``.

    ``length`` is a multiple of four; ``context`` is the longest text; there are ``D ln D / narrow`` features.
    """

    slug = "sea"
    title = "SEA (sparse linear attention with an estimated mask)"
    paper = "https://arxiv.org/abs/2310.01777"
    code = "https://github.com/gmlwns2000/sea-attention"
    promises = Promises(cross=False, decodes=False, padding=False, exponent=1.0)

    def __init__(self, keep: int = 64, length: int = 256, context: int = 2048, narrow: int = 8, seed: int = 0):
        self.keep, self.length, self.context, self.narrow, self.seed = keep, length, context, narrow, seed

    def make(self, heads: int, width: int) -> Estimator:
        """A fresh estimator for a layer.

        Raises:
            SpecError: a setting below 1, a length that is no multiple of four, or no features for heads so narrow.
        """
        if min(self.keep, self.length, self.context, self.narrow) < 1 or self.length % SHRINK:
            raise SpecError(f"SEA: expected settings of at least 1, and length a multiple of {SHRINK}; got {self}")
        if width * math.log(width) < self.narrow:
            raise SpecError(f"SEA: narrow={self.narrow} leaves heads of width {width} without features")
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            return Estimator(heads, width, self.keep, self.length, self.context, self.narrow, self.seed)

    def apply(self, model: Any, estimators: dict[int, Estimator] | None = None) -> AbstractContextManager[None]:
        """Read whole prompts this way until the context is left, with untrained estimators where none are given."""
        given = estimators or {}

        def layer(module: Any, q: Tensor) -> Callable[..., Tensor]:
            number = module.layer_idx
            return partial(attend, given[number] if number in given else self.make(q.shape[1], q.shape[3]).to(q))

        return on_whole_prompts(model, layer)

    def claim(self) -> ClaimNumbers:
        """The embedded model, distilled briefly: its perplexity, the recall of the mask, and how near the map is."""
        from ...study.probes import embedded, mean_loss, prose
        from ._picture_lessons import distill, nearness

        small = Sea(KEEP, length=SIZE // 8, context=SIZE)  # the official ratios, of a text of 2048
        model, (learn, held) = embedded(), prose("sea", (STEPS, SIZE), (8, SIZE))
        made = distill(small, model, learn.split(1), rate=3e-3)
        fresh = {i: small.make(e.heads, e.place.shape[1]) for i, e in made.items()}
        losses = {"dense": mean_loss(model, held, SIZE // 2)}
        with small.apply(model, made):
            losses["sea"] = mean_loss(model, held, SIZE // 2)
        losses["window"] = mean_loss(model, held, SIZE // 2, Attention(mask=Causal() & Window(KEEP)))
        times = {name: math.exp(losses[name] - losses["dense"]) for name in ("sea", "window")}
        layers = [(made[i], fresh[i], layer) for text in held.split(1) for i, layer in enumerate(read(model, text))]
        seen = [nearness(*layer) for layer in layers]
        found = {name: statistics.fmean(of[name] for of in seen) for name in seen[0]}
        return ClaimNumbers.decide(
            {f"loss_{name}": round(x, 4) for name, x in losses.items()}
            | {f"perplexity_{name}_of_dense": round(x, 4) for name, x in times.items()}
            | {name: round(x, 4) for name, x in found.items()},
            f"After {STEPS} texts of {SIZE} bytes, reading {KEEP} keys per query and head, the embedded model's"
            f" perplexity is {times['sea']:.3f} times the dense one's ({times['window']:.3f} with the last {KEEP})."
            f" The mask holds {found['recall']:.0%} of the greatest weights (untrained {found['recall_untrained']:.0%},"
            f" the last keys {found['recall_window']:.0%}); the map shares {found['overlap']:.0%} of the dense"
            f" attention's mass (untrained {found['overlap_untrained']:.0%}).",
            perplexity_near_dense=times["sea"] <= NEAR,
            recall_above_a_window=found["recall"] > found["recall_window"],
            the_map_is_learned=found["overlap"] > found["overlap_untrained"],
        )
