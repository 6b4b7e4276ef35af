"""Perceiver AR's network, and the positions that it counts back from the last token."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._layers import Layer

if TYPE_CHECKING:
    from .perceiver_ar import PerceiverAR


class Network(nn.Module):
    """The whole architecture of the settings of ``system``, for tokens below ``vocabulary``."""

    def __init__(self, system: PerceiverAR, vocabulary: int):
        super().__init__()
        width, heads = system.width, system.heads
        self.latents, self.absolute = system.latents, system.positions == "absolute"
        place = None if self.absolute else partial(rotate, wavelength=system.wavelength)
        layer = partial(Layer, width, heads, activation=SquaredReLU(), place=place)
        self.embed, self.latent = nn.Embedding(vocabulary, width), nn.Linear(width, width)
        self.cross = layer(system.build(heads), source=width)
        self.stack = nn.ModuleList([layer(system.build(heads)) for _ in range(system.layers)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)
        self.apply(_initialize)
        nn.init.trunc_normal_(self.embed.weight)
        nn.init.zeros_(self.head.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``[B, min(latents, N), vocabulary]`` of what follows each of the last tokens of ``[B, N]``."""
        x = self.embed(tokens)
        if self.absolute:
            x = x + sinusoids(tokens.shape[1], x.shape[-1]).to(x)
        z = self.cross(self.latent(x[:, -self.latents :]), x)
        for layer in self.stack:
            z = layer(z)
        return self.head(self.norm(z))

    def loss(self, tokens: Tensor) -> Tensor:
        """Cross entropy ``[B, min(latents, N)]`` in nats of the last of the tokens ``[B, N + 1]``."""
        logits = self(tokens[:, :-1])
        return F.cross_entropy(logits.mT, tokens[:, -logits.shape[1] :], reduction="none")


class SquaredReLU(nn.Module):
    """``relu(x)²``."""

    def forward(self, x: Tensor) -> Tensor:
        """The same shape."""
        return F.relu(x).square()


def _initialize(module: nn.Module) -> None:
    """Haiku's variance scaling: a normal of variance 1 / inputs, cut at two deviations; no biases."""
    if isinstance(module, nn.Linear):
        scale = 1 / (0.87962566 * math.sqrt(module.in_features))  # what the cut takes from the deviation
        nn.init.trunc_normal_(module.weight, std=scale, a=-2 * scale, b=2 * scale)
        nn.init.zeros_(module.bias)


def rotate(x: Tensor, wavelength: float, fraction: float = 0.5) -> Tensor:
    """Rotary positions on the first channels of ``[B, H, N, D]``: neighbours are the two coordinates."""
    turned = int(x.shape[-1] * fraction) // 2 * 2
    speed = wavelength ** -torch.linspace(0, 1, turned // 2, dtype=x.dtype, device=x.device)
    place = torch.arange(x.shape[-2] - 1, -1, -1, dtype=x.dtype, device=x.device)
    angle = place[:, None] * speed
    a, b = x[..., :turned:2], x[..., 1:turned:2]
    pairs = torch.stack([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)
    return torch.cat([pairs.flatten(-2), x[..., turned:]], -1)


def sinusoids(length: int, width: int, longest: float = 10_000.0) -> Tensor:
    """Sines, then cosines, of the distance to the last position, ``[length, width]``."""
    half = width // 2
    speed = longest ** -torch.linspace(0, 1, half)
    angle = torch.arange(length - 1, -1, -1)[:, None] * speed
    return F.pad(torch.cat([angle.sin(), angle.cos()], -1), (0, width - 2 * half))
