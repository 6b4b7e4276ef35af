"""FIT's blocks, local and global layers by turns; and the trunk that its forms share: positions, latents, blocks."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core import masks
from ...core.errors import SpecError
from ...core.spec import Attention
from ._layers import Layer

if TYPE_CHECKING:
    from .fit import FIT

EPS = 1e-6


class Block(nn.Module):
    """Local layers, and unless there are no global ones: read, heed conditions, global layers, write if not last."""

    def __init__(self, system: FIT, local: int, total: int, causal: bool, conditions: bool, last: bool):
        super().__init__()
        wide, deep = system.width, system.latent_width
        own = partial(Layer, activation=nn.GELU(), eps=EPS)
        cross = partial(
            own, heads=min(system.heads, system.latent_heads), spec=Attention(), inner=min(wide, deep), widen=0
        )
        inside = Attention(mask=masks.Causal() if causal else None)
        among = Attention(mask=masks.Causal() | masks.Blocks(system.latents) if causal or system.ordered else None)
        self.causal = causal
        self.local = nn.ModuleList([own(wide, system.heads, inside) for _ in range(local)])
        self.read = cross(deep, source=wide) if total else None
        told = partial(cross, heads=system.latent_heads, inner=deep)
        self.heed = told(deep, source=deep) if total and conditions else None
        self.among = nn.ModuleList([own(deep, system.latent_heads, among) for _ in range(total)])
        self.write = None if last else cross(wide, source=deep)

    def forward(self, x: Tensor, z: Tensor, conditions: Tensor | None) -> tuple[Tensor, Tensor]:
        """Tokens ``[B T, n, width]`` and latents ``[B, T, m, latent_width]`` after this block."""
        for layer in self.local:
            x = layer(x)
        if self.read is None:
            return x, z
        shape = z.shape
        z = self.read(z.flatten(0, 1), x).view(shape).flatten(1, 2)
        if self.heed is not None:
            z = self.heed(z, conditions)
        for layer in self.among:
            z = layer(z)
        z = z.view(shape)
        if self.write is not None:
            # a group's latents have read its last tokens: as a decoder, only later groups may read them
            before = F.pad(z[:, :-1], (0, 0, 0, 0, 1, 0)) if self.causal else z
            x = self.write(x, before.flatten(0, 1))
        return x, z


class Trunk(nn.Module):
    """What the three forms share: positions, latents and blocks."""

    def __init__(self, system: FIT, groups: int, form: str):
        super().__init__()
        self.places = nn.Parameter(torch.empty(system.group, system.width))
        self.latents = nn.Parameter(torch.empty(groups, system.latents, system.latent_width))
        blocks = system.blocks()
        self.blocks = nn.ModuleList(
            [
                Block(system, local, total, form == "decoder", form == "denoiser", i == len(blocks) - 1)
                for i, (local, total) in enumerate(blocks)
            ]
        )
        self.norm = nn.LayerNorm(system.width, EPS)

    def initialize(self) -> None:
        """Weights as Keras draws them: uniform, for heads by its count of a kernel of three dimensions; no biases."""
        self.apply(_initialize)
        for drawn in (self.places, self.latents):
            cut_normal(drawn)

    def run(self, x: Tensor, more: Tensor | float = 0, conditions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Normed tokens ``[B, T, n, width]`` and latents ``[B, T, m, latent_width]``, to which ``more`` is added."""
        expected = (len(self.latents), *self.places.shape)
        if x.shape[1:] != expected:
            raise SpecError(f"FIT: expected [B, groups, group, width] = [B, {expected}]; got {tuple(x.shape)}")
        groups = x.shape[:2]
        x = (x + self.places).flatten(0, 1)
        z = (self.latents + more).expand(groups[0], *self.latents.shape)
        for block in self.blocks:
            x, z = block(x, z, conditions)
        return self.norm(x).unflatten(0, groups), z


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
    if isinstance(module, Layer):
        for part in (module.q, module.k, module.v):
            bound = math.sqrt(6 / (part.in_features * (module.heads + part.out_features // module.heads)))
            nn.init.uniform_(part.weight, -bound, bound)
        bound = math.sqrt(6 / (module.out.in_features + module.heads * module.out.out_features))
        nn.init.uniform_(module.out.weight, -bound, bound)


def cut_normal(x: Tensor) -> None:
    """Of deviation 0.02, cut at two."""
    nn.init.trunc_normal_(x, std=0.02, a=-0.04, b=0.04)
