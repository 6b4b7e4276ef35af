"""Feature maps: the weight of a key is the dot product of its features with the query's, ``f(q) . f(k)``.

A map sees float32 (or float64) vectors ``[G, n, D]``, where G runs over batch and heads and ``heads [G]`` says which
head each is, and gives ``[G, n, F]``. It must treat each vector alone: the engine hands over pieces of a sequence.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import SpecError
from ..tile import Part


class Feature(Part):
    """Base of all feature maps: define ``forward``, or ``query`` and ``key`` where they differ."""

    def forward(self, x: Tensor, heads: Tensor) -> Tensor:
        """Features ``[G, n, F]`` of vectors ``[G, n, D]`` of these heads ``[G]``."""
        raise NotImplementedError(f"{type(self).__name__} defines no features: define forward(self, x, heads)")

    def query(self, q: Tensor, heads: Tensor) -> Tensor:
        """Features of queries."""
        return self(q, heads)

    def key(self, k: Tensor, heads: Tensor) -> Tensor:
        """Features of keys."""
        return self(k, heads)


class Identity(Feature):
    """``f(x) = x``: retention, gated linear attention, the delta rule."""

    def forward(self, x: Tensor, heads: Tensor) -> Tensor:
        return x


class Elu1(Feature):
    """``f(x) = elu(x) + 1`` (Katharopoulos et al., arXiv:2006.16236, eq. 7)."""

    def forward(self, x: Tensor, heads: Tensor) -> Tensor:
        return F.elu(x) + 1


class ReLU(Feature):
    """``f(x) = max(x, 0)``."""

    def forward(self, x: Tensor, heads: Tensor) -> Tensor:
        return x.relu()


class Exp(Feature):
    """``f(x) = exp(x)``, each coordinate by itself."""

    def forward(self, x: Tensor, heads: Tensor) -> Tensor:
        return x.exp()


class Learned(Feature):
    """What a function or module makes of the vectors; the module's parameters are learned."""

    def __init__(self, function: Callable[[Tensor], Tensor]):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, heads: Tensor) -> Tensor:
        return self.function(x)


class Pair(Feature):
    """One map for the queries, another for the keys."""

    def __init__(self, queries: Any, keys: Any):
        super().__init__()
        self.queries, self.keys = as_feature(queries), as_feature(keys)

    def query(self, q: Tensor, heads: Tensor) -> Tensor:
        return self.queries.query(q, heads)

    def key(self, k: Tensor, heads: Tensor) -> Tensor:
        return self.keys.key(k, heads)


class SoftmaxHedgehog(Feature):
    """Hedgehog (arXiv:2402.04347): softmax over the features of ``y = x W`` and of ``-y``.

    Two functions go by this name. LoLCATs (``joint=False``): ``[softmax(y), softmax(-y)]``, each clamped at 1e-12.
    fla (``joint=True``): one ``softmax([2 y, -2 y])``.

    Args:
        weight: ``[D, M]`` shared by the heads (fla), or ``[H, D, M]`` (LoLCATs); a parameter is learned. Not given:
            ``y = x``, where both learned ones start.
        joint: fla's form.
    """

    weight: Tensor | None

    def __init__(self, weight: Tensor | None = None, joint: bool = False):
        super().__init__()
        self.hold("weight", weight)
        self.joint = joint

    def forward(self, x: Tensor, heads: Tensor) -> Tensor:
        if self.weight is not None:
            weight = self.weight.to(x.dtype)
            x = x @ (weight[heads] if weight.ndim == 3 else weight)
        if self.joint:
            return torch.cat([2 * x, -2 * x], -1).softmax(-1)
        return torch.cat([x.softmax(-1), (-x).softmax(-1)], -1).clamp(min=1e-12)


class Taylor2(Feature):
    """Based (arXiv:2402.18668): ``f(q) . f(k) = 1 + s + s^2 / 2`` with ``s = q . k / sqrt(D)``.

    Each product of two coordinates once: F = 1 + D + D (D + 1) / 2.
    """

    def forward(self, x: Tensor, heads: Tensor) -> Tensor:
        width = x.shape[-1]
        x = x * width**-0.25
        i, j = torch.triu_indices(width, width, device=x.device)
        factor = torch.where(i == j, math.sqrt(0.5), 1.0).to(x.dtype)
        return torch.cat([torch.ones_like(x[..., :1]), x, x[..., i] * x[..., j] * factor], -1)


class RandomFeatures(Feature):
    """Performer's positive random features (arXiv:2009.14794, lemma 1): ``E[f(q) . f(k)] = exp(q . k / sqrt(D))``.

    ``f(x) = exp(w x - |x|^2 / 2) / sqrt(M)`` with rows ``w`` of blocks of orthogonal directions whose lengths are
    those of Gaussian vectors, and ``x`` divided by ``D ** 0.25``. A query's features are divided by their greatest,
    which the sum of weights cancels. The official code also divides by the greatest over all keys, later ones
    included, and adds 1e-6; here each key is treated alone, and ``exp(w x - |x|^2 / 2) <= exp(|w|^2 / 2)``. It leaves
    the signs of its QR to LAPACK, which biases the estimate; here they are set.

    Args:
        width: D.
        count: M; ``D ln D`` if not given, as in performer-pytorch.
        seed: of the draw.
    """

    weight: Tensor

    def __init__(self, width: int, count: int | None = None, seed: int = 0):
        super().__init__()
        count = int(width * math.log(width)) if count is None else count
        draw = torch.Generator().manual_seed(seed)
        blocks = []
        for _ in range(-(-count // width)):
            turn, rest = torch.linalg.qr(torch.randn(width, width, generator=draw, dtype=torch.float64))
            blocks.append(turn * rest.diagonal().sign())  # else LAPACK's signs favour some directions
        lengths = torch.randn(count, width, generator=draw, dtype=torch.float64).norm(dim=-1, keepdim=True)
        self.register_buffer("weight", (torch.cat(blocks)[:count] * lengths).float())

    def exponent(self, x: Tensor) -> Tensor:
        """``w x - |x|^2 / 2``."""
        x = x * x.shape[-1] ** -0.25
        return x @ self.weight.to(x.dtype).T - x.square().sum(-1, keepdim=True) / 2

    def query(self, q: Tensor, heads: Tensor) -> Tensor:
        exponent = self.exponent(q)
        return (exponent - exponent.detach().amax(-1, keepdim=True)).exp() * len(self.weight) ** -0.5

    def key(self, k: Tensor, heads: Tensor) -> Tensor:
        return self.exponent(k).exp() * len(self.weight) ** -0.5


class Focused(Feature):
    """FLatten (arXiv:2308.00442, eq. 5): ``f(x) = x^p |x| / |x^p|`` of ``x = (relu(x) + 1e-6) / scale``.

    Queries and keys that point the same way move together, others apart. The official code takes the norms over all
    heads at once; here each head has its own.

    Args:
        power: p.
        scale: positive tensor ``[D]`` (official: softplus of a learned one), or a number.
    """

    scale: Tensor | float

    def __init__(self, power: float = 3.0, scale: Tensor | float = 1.0):
        super().__init__()
        self.power = power
        self.hold("scale", scale)

    def forward(self, x: Tensor, heads: Tensor) -> Tensor:
        x = (x.relu() + 1e-6) / self.scale
        sharp = (x / x.amax(-1, keepdim=True)) ** self.power  # the quotient cancels below, and cannot overflow
        return sharp * (x.norm(dim=-1, keepdim=True) / sharp.norm(dim=-1, keepdim=True))


def as_feature(feature: Any) -> Feature:
    """A part as it is, ``None`` as :class:`Identity`, a module or function as :class:`Learned`."""
    if feature is None:
        return Identity()
    if isinstance(feature, Feature):
        return feature
    if isinstance(feature, nn.Module) or callable(feature):
        return Learned(feature)
    raise SpecError(f"feature must be a part of saccade.linear.features or a function of vectors; got {feature!r}")
