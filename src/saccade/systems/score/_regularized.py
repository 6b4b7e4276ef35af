"""Attention that is another while it trains: such layers, those that claims compare them with, and their task."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ...core import edits, masks
from ...core.attend import attention
from ...core.spec import Attention
from ...nn import Encoder, MultiHead
from ...nn.attention import AnyCache, padded
from ...nn.backbones import Place
from ...nn.positions import RoPE

BATCH = 32


class Regularized(MultiHead):
    """Softmax attention; while it trains, and does not decode with a cache, what :meth:`noisy` makes of it."""

    def __init__(self, place: Place, rate: float, causal: bool = False):
        spec = Attention(mask=masks.Causal() if causal else masks.Full())
        super().__init__(spec, place.width, place.heads, positions=place.positions)
        self.rate = rate

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, cache: AnyCache | None = None, keep: Tensor | None = None,
        **given: Any,
    ) -> Tensor:  # fmt: skip
        """What the heads read, ``[B, H, N, Dv]``."""
        if not self.training or cache is not None or self.rate == 0:
            return super().attend(q, k, v, cache=cache, keep=keep, **given)
        assert isinstance(self.spec, Attention)
        return self.noisy(q, k, v, self.spec if keep is None else padded(self.spec, keep))

    def noisy(self, q: Tensor, k: Tensor, v: Tensor, spec: Attention) -> Tensor:
        """What the heads read in training, where ``spec`` hides padding. What is drawn belongs to this call alone."""
        raise NotImplementedError


class DroppedWeights(Regularized):
    """Attention dropout: a share of the weights is zero, the others are greater for it."""

    def noisy(self, q: Tensor, k: Tensor, v: Tensor, spec: Attention) -> Tensor:
        """Weights drop out one by one."""
        drop = edits.Dropout(self.rate)
        drop.reseed()
        return attention(q, k, v, Attention(mask=spec.mask, edits=[drop]))


class DroppedHeads(Regularized):
    """DropHead (arXiv:2004.13342): a share of the heads is zero, the others are greater for it."""

    def noisy(self, q: Tensor, k: Tensor, v: Tensor, spec: Attention) -> Tensor:
        """Heads drop out, for each sequence others."""
        whole = (torch.rand(*q.shape[:2], 1, 1, device=q.device) >= self.rate).to(q.dtype)
        return attention(q, k, v, spec) * whole / whole.mean(1, keepdim=True).clamp(min=1 / q.shape[1])


class Parser(nn.Module):
    """A small encoder that likes, for each word, one of the vocabulary: the word that it depends on."""

    def __init__(self, layer: Callable[[Place], nn.Module]):
        from ...worlds.grammar import words

        super().__init__()
        place = Place(64, 4, 0, 2, RoPE(), None)
        self.encoder = Encoder(
            len(words()), place.width, place.layers, place.heads,
            attention=lambda index, heads: layer(replace(place, index=index)),
        )  # fmt: skip

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``[B, N, words]`` of tokens ``[B, N]``, 0 where there is none."""
        return self.encoder(tokens, tokens != 0) @ self.encoder.embed.table.weight.T


def parsed(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of sentences, and the word that each word depends on; the root's is 0."""
    from ...worlds.grammar import batch, grammar

    stream = grammar(seed)
    while True:
        given = batch(stream, BATCH)
        heads = given.tokens.gather(1, given.heads.clamp(min=0)).masked_fill(given.heads == -1, 0)
        yield given.tokens, heads.masked_fill(given.tokens == 0, -100)
