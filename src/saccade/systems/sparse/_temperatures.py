"""How far approximate attention is off, by inverse temperature: on points in clusters, and in a model's layers."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ...hosts.replaced import Read

BETAS, FACTORS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0), (0.25, 0.5, 1.0, 2.0, 4.0)  # of the points, and of a model's own

Cases = list[list[Read]]
"""By inverse temperature, what each layer attends with."""


def errors(kinds: Mapping[str, Callable[..., Tensor]], cases: Cases, causal: bool) -> dict[str, list[float]]:
    """Of every kind of ``attend(q, k, v, scale, causal)``, its :func:`error` in each case, the mean over its layers."""
    return {
        name: [statistics.fmean(error(attend, layer, causal) for layer in layers) for layers in cases]
        for name, attend in kinds.items()
    }


@torch.no_grad()
def error(attend: Callable[..., Tensor], layer: Read, causal: bool) -> float:
    """Of the output: the norm of what is wrong over that of what is right."""
    exact = scaled_dot_product_attention(*layer[:3], is_causal=causal, scale=layer.scale, enable_gqa=True)
    off = attend(*layer, causal) - exact
    return float(off.norm() / exact.norm())


def points(n: int = 3136, width: int = 64, members: int = 8, spread: float = 0.5) -> Cases:
    """Scatterbrain's process: ``members`` points around each normal center of length 1 are both queries and keys."""
    source = torch.Generator().manual_seed(1)
    centers, noise, v = torch.randn(3, 1, 2, n, width, generator=source).unbind(0)
    x = (centers[:, :, : n // members].repeat_interleave(members, 2) + spread * noise) * width**-0.5
    return [[Read(x, x, v, beta)] for beta in BETAS]


def tempered(layers: list[Read]) -> Cases:
    """What a model's layers attend with, at other inverse temperatures too."""
    return [[layer._replace(scale=factor * layer.scale) for layer in layers] for factor in FACTORS]
