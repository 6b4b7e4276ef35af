"""Softmax attention as what linear attention learns from: how far its weights are from a layer's, and how alike."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...core.linear import LinearAttention, features, linear_weights
from ...hosts.replaced import Read


def softmax_weights(layer: Read) -> Tensor:
    """Softmax weights ``[B, H, N, N]`` of a causal layer."""
    k = layer.k.repeat_interleave(layer.q.shape[1] // layer.k.shape[1], 1)
    later = torch.ones(layer.q.shape[2], layer.q.shape[2], dtype=torch.bool).triu(1)
    return (layer.q @ k.mT * layer.scale).masked_fill(later, -torch.inf).softmax(-1)


def mimicry(spec: nn.Module, layer: Read) -> Tensor:
    """Cross entropy from the softmax weights to the program's, the mean over rows, in nats."""
    w = linear_weights(layer.q, layer.k, spec)  # type: ignore[arg-type]
    return -(softmax_weights(layer) * w.clamp(min=1e-12).log()).sum(-1).mean()


@torch.no_grad()
def weight_shapes(made: nn.ModuleList, layers: Sequence[Read]) -> dict[str, float]:
    """Mean entropy of the last row's weights, and how many of its pairs of keys they order as the dot products do."""
    numbers: dict[str, list[float]] = {}
    elu = LinearAttention(features.Elu1(), normalize=True)
    for number, layer in enumerate(layers):
        truth = softmax_weights(layer)[..., -1, :]
        order = (truth[..., :, None] - truth[..., None, :]).sign()
        specs = {"hedgehog": made[number % len(made)], "elu": elu}
        maps = {name: linear_weights(layer.q, layer.k, spec)[..., -1, :] for name, spec in specs.items()}  # type: ignore[arg-type]
        for name, w in {"softmax": truth, **maps}.items():
            numbers.setdefault(f"entropy_{name}", []).append(float(torch.special.entr(w).sum(-1).mean()))
            same = (w[..., :, None] - w[..., None, :]).sign() * order
            numbers.setdefault(f"monotone_{name}", []).append(float((same > 0).float().sum() / (order != 0).sum()))
    return {name: statistics.fmean(x) for name, x in numbers.items()}
