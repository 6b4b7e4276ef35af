"""Attention whose queries and keys are made from another source than its values, and a GPT that gives it that source.

    random-fixed     the same layers on fixed noise
    text-fixed       the same layers on a fixed text
    static           the embeddings

Paper, code and what differs: :mod:`.deconstructing_attention`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...core.errors import SpecError, Unsupported
from ...nn import GPT, MultiHead
from ...nn.attention import split
from ...nn.backbones import Block

if TYPE_CHECKING:
    from .deconstructing_attention import DeconstructingAttention

SOURCES = ("random-fixed", "text-fixed", "static")  # of queries and keys, other than the states
NOISE = 0.02  # deviation of the fixed noise: that of embeddings


class Elsewhere(MultiHead):
    """Queries and keys of ``source [B or 1, N, width]`` where a model sets it, values of the stream."""

    source: Tensor | None = None

    def project(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As ever, but for what queries and keys are made from."""
        source = x if self.source is None else self.source
        q, k = (split(part(source), self.heads).expand(len(x), -1, -1, -1) for part in (self.q, self.k))
        return q, k, split(self.v(context), self.heads)


class Deconstructed(GPT):
    """A GPT that gives layers of another source what they need; arguments as GPT's.

    Args:
        system: the variant.
        text: int64 ``[length]``: of "text-fixed"; its length is also that of the noise.
    """

    text: Tensor
    noise: Tensor

    def __init__(self, vocab: int, *sizes: int, system: DeconstructingAttention, text: Tensor):
        super().__init__(vocab, *sizes, attention=system)
        self.variant, width = system.variant, self.embed.table.embedding_dim
        noise = torch.randn(1, len(text), width, generator=torch.Generator().manual_seed(0)) * NOISE
        self.register_buffer("text", text[None], persistent=False)
        self.register_buffer("noise", noise, persistent=False)

    def states(self, tokens: Tensor, caches: Any = None) -> Tensor:
        """Last hidden states ``[B, N, width]``. Raises: Unsupported with caches, where there is another source."""
        if self.variant not in SOURCES:
            return super().states(tokens, caches)
        if caches is not None:
            raise Unsupported(f"{self.variant} has no cache: hand over the whole sequence")
        x, n = self.embed(tokens), tokens.shape[1]
        if n > self.text.shape[1]:
            raise SpecError(f"the fixed sequence has {self.text.shape[1]} tokens, these are {n}: give a longer text=")
        fixed = self.variant != "static"
        source = (self.noise if self.variant == "random-fixed" else self.embed(self.text))[:, :n] if fixed else x
        for block in self.stack.blocks:
            assert isinstance(block, Block)
            layer = block.attention
            following = block(source) if fixed else source
            if isinstance(layer, Elsewhere):
                layer.source = block.before(source)
            x, source = block(x), following
            if isinstance(layer, Elsewhere):
                layer.source = None
        return self.stack.last(x)
