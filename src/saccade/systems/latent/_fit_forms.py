"""FIT's three forms: an encoder of vectors, a denoiser of vectors, a decoder of tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ._interleaved import EPS, Trunk, cut_normal
from ._layers import perceptron

if TYPE_CHECKING:
    from .fit import FIT


class Encoder(Trunk):
    """The form that reads vectors."""

    def __init__(self, system: FIT, inputs: int, groups: int):
        super().__init__(system, groups, "encoder")
        self.stem = nn.Sequential(nn.Linear(inputs, system.width), nn.LayerNorm(system.width, EPS))
        self.norm_latents = nn.LayerNorm(system.latent_width, EPS)
        self.initialize()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens ``[B, T, n, width]`` and latents ``[B, T, m, latent_width]`` of ``[B, T, n, inputs]``."""
        x, z = self.run(self.stem(x))
        return x, self.norm_latents(z)


class Denoiser(Trunk):
    """The form that takes noise out of vectors, told a time and conditions, and by its latents of the step before."""

    def __init__(self, system: FIT, inputs: int, conditions: int, groups: int):
        super().__init__(system, groups, "denoiser")
        width = system.latent_width
        self.stem = nn.Sequential(nn.Linear(inputs, system.width), nn.LayerNorm(system.width, EPS))
        self.time = nn.Sequential(nn.Linear(width // 4, width), nn.SiLU(), nn.Linear(width, width))
        self.conditions = nn.Linear(conditions, width)
        self.previous, self.norm_previous = perceptron(width, 4, nn.GELU(), EPS), nn.LayerNorm(width, EPS)
        self.out = nn.Linear(system.width, inputs)
        self.initialize()
        nn.init.zeros_(self.norm_previous.weight)

    def forward(
        self, x: Tensor, time: Tensor, conditions: Tensor, previous: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Output ``[B, T, n, inputs]``, and latents for the next call; time ``[B]``, conditions ``[B, S, C]``."""
        clock = self.time(_clock(1000 * time, self.latents.shape[-1] // 4))
        told = torch.cat([clock[:, None], self.conditions(conditions)], 1)
        old = torch.zeros_like(self.latents) if previous is None else previous
        x, z = self.run(self.stem(x), self.norm_previous(old + self.previous(old)), told)
        return self.out(x), z


class Decoder(Trunk):
    """The form that says the next token, groups one after the other."""

    def __init__(self, system: FIT, vocabulary: int, groups: int):
        super().__init__(system, groups, "decoder")
        self.embed = nn.Embedding(vocabulary, system.width)
        self.bias = nn.Parameter(torch.empty(vocabulary))
        self.initialize()
        for drawn in (self.embed.weight, self.bias):
            cut_normal(drawn)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``[B, T, n, vocabulary]`` of what follows each of the tokens ``[B, T, n]``."""
        return self.run(self.embed(tokens))[0] @ self.embed.weight.T + self.bias


def _clock(time: Tensor, width: int) -> Tensor:
    """Sines, then cosines, of times ``[B]``, ``[B, width]``, each row of mean 0 and deviation 1."""
    angle = time[:, None] * 10_000.0 ** (-torch.arange(0, width, 2, device=time.device) / width)
    code = torch.cat([angle.sin(), angle[:, : width // 2].cos()], -1)
    return (code - code.mean(-1, keepdim=True)) / code.std(-1, correction=0, keepdim=True)
