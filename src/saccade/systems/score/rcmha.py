"""RCMHA: relative multi-head attention whose queries, keys and values are each smoothed over the last three tokens.

    q, k, v = conv(x Wq), conv(x Wk), conv(x Wv + b)      depth-wise, causal; a kernel per coordinate, for all heads
    s[i, j] = ((q[i] + u) . k[j] + q[i] . r[i - j] + c[i - j]) / sqrt(D)
    w = softmax(s) over j <= i

per head; the vectors r and the numbers c of each distance and the vector u start as zeros (Transformer-XL's terms, of
labml: r is a table and no function). Without the convolutions it is RMHA.

Paper: RCMHA: Relative Convolutional Multi-Head Attention for Natural Language Modelling, arXiv:2308.03429
Code: https://github.com/hermansh-id/rcmha (rcmha/attention.py: RelativeMultiHeadAttention; distances up to 4096,
    kernels of 3 with torch's first weights, biases of the values and the output); its main.py trains labml's RMHA

Differs: r and c have no entries for distances into the future, which the official mask hides; distances of ``reach``
and more share the last entry. A decoding step continues the convolutions; the official memory of earlier segments
starts those of the queries anew. Dropout is left out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.errors import SpecError
from ...nn import GPT, KVCache
from ...nn.attention import AnyCache
from ...nn.backbones import Place
from ...nn.positions import Learned
from ..base import ClaimNumbers, LayerSystem, Promises
from ._relative import Relative, step_bytes

KERNEL = 3


@dataclass
class RecentCache(KVCache):
    """Keys and values so far, and what the convolutions still need: the last tokens of the stream."""

    recent: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all."""
        return super().nbytes + (0 if self.recent is None else self.recent.nbytes)


class Smooth(nn.Conv1d):
    """A causal convolution along the tokens of ``[B, H, N, D]``, the same in all heads."""

    keeps_start = True  # torch's first weights, as in the official code

    def forward(self, input: Tensor) -> Tensor:
        """The same shape."""
        along = F.pad(input.mT.flatten(0, 1), (KERNEL - 1, 0))
        return super().forward(along).unflatten(0, input.shape[:2]).mT


class Convolved(Relative):
    """RCMHA: the same on queries, keys and values that are convolved along the stream."""

    def __init__(self, place: Place, reach: int):
        super().__init__(place, reach)
        wide = self.head_width
        self.convolutions = nn.ModuleList([Smooth(wide, wide, KERNEL, groups=wide) for _ in "qkv"])

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, cache: AnyCache | None = None, keep: Tensor | None = None
    ) -> Tensor:
        """As :class:`MultiHead`'s; a cache also holds the last tokens of the stream."""
        if context is not None:
            raise SpecError("rcmha: distances have a meaning within one stream alone: give no context")
        whole = x
        if isinstance(cache, RecentCache):
            whole = x if cache.recent is None else torch.cat([cache.recent, x], 1)
            cache.recent = whole[:, 1 - KERNEL :]
        q, k, v = (part[:, :, -x.shape[1] :] for part in self.project(whole, whole))
        return self.merge(self.attend(q, k, v, cache=cache, keep=keep), x)

    def cache(self) -> RecentCache:
        """An empty cache."""
        return RecentCache()

    def project(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values ``[B, H, N, D]``, convolved."""
        parts = super().project(x, context)
        q, k, v = (smooth(part) for part, smooth in zip(parts, self.convolutions, strict=True))
        return q, k, v


class RCMHA(LayerSystem):
    """Settings: ``reach``, distances that have an entry of their own."""

    slug = "rcmha"
    title = "Relative convolutional multi-head attention (RCMHA)"
    paper = "https://arxiv.org/abs/2308.03429"
    code = "https://github.com/hermansh-id/rcmha"
    promises = Promises(unit_rows=True, hosts=())

    def __init__(self, reach: int = 4096):
        if reach < 1:
            raise SpecError(f"rcmha: reach must be at least 1; got {reach}")
        self.reach = reach

    def layer(self, place: Place) -> nn.Module:
        """Relative convolutional attention."""
        return Convolved(place, self.reach)

    def claim(self) -> ClaimNumbers:
        """Language models of one width and depth: accuracy beside MHA, memory of a training step beside RMHA."""
        from ...study.trainer import Setup, compete, language, next_token
        from ...worlds.text import BOS

        setup = Setup(steps=90, seeds=(0, 1))
        place = Place(setup.width, setup.heads, 0, setup.layers, None, None)
        make = partial(GPT, BOS + 1, setup.width, setup.layers, setup.heads)
        models = {
            "mha": lambda: make(positions=Learned(setup.context, setup.width)),
            "rmha": lambda: make(attention=lambda *_: Relative(place, setup.context), positions=None),
            "rcmha": lambda: make(attention=RCMHA(setup.context), positions=None),
        }
        task = replace(language(setup), measure=_right, score="accuracy")
        result = compete(models, task, setup)
        above = result.excess("rcmha", "mha")
        tokens = next(iter(task.held()))
        bytes_of = {name: step_bytes(kept[0], lambda m: next_token(m, tokens)) for name, kept in result.models.items()}
        return ClaimNumbers.decide(
            result.numbers()
            | {f"step_bytes_{name}": count for name, count in bytes_of.items()}
            | {f"parameters_{name}": result.parameters(name) for name in models},
            f"RCMHA names the next byte in {result.mean('rcmha'):.2%} of cases, MHA in {result.mean('mha'):.2%}"
            f" (difference {above.mean:+.2%}, standard error {above.error:.2%}), RMHA in {result.mean('rmha'):.2%}; a"
            f" step of training holds {bytes_of['rcmha'] / 1e6:.1f} MB, RMHA's {bytes_of['rmha'] / 1e6:.1f} MB.",
            accuracy_above_mha=above.mean > 0,
            less_memory_than_rmha=bytes_of["rcmha"] < bytes_of["rmha"],
        )


def _right(model: nn.Module, tokens: Tensor) -> Tensor:
    from ...study.trainer import accuracy

    return accuracy(model, (tokens[:, :-1], tokens[:, 1:]))
