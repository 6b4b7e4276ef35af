"""Small backbones that any attention plugs into: GPT, Encoder, EncoderDecoder, ViT.

``attention=`` is one of

    None                    plain softmax attention, causal where the backbone is
    "cog", "sigmoid", ...   a system of the catalogue, by its slug
    Cog(), ...              a system with its settings
    Attention(...)          a program (or a LinearAttention); every layer gets a copy
    f(layer, heads)         a function of the layer's number, to a program or to a layer of its own

A layer of its own is a :class:`~saccade.nn.MultiHead` or any module of ``(x, cache=, keep=)``, to decode with
``cache()``. A system that is more
than a program makes one in a method ``layer(place)``, see :class:`Place`. Blocks are pre-norm.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.errors import SpecError, Unsupported
from ..core.masks import Causal, Full
from ..core.spec import Attention
from .attention import PROGRAMS, AnyCache, MultiHead
from .init import fresh_seed, initialise
from .positions import Learned, RoPE

Mechanism = Any
"""What ``attention=`` takes, see above."""
Positions = nn.Module | str | None
"""What ``positions=`` takes: ``"rope"``, a module of :mod:`saccade.nn.positions`, or ``None``."""


@dataclass(frozen=True)
class Place:
    """Where a layer of attention stands: what a system's ``layer(place)`` is told."""

    width: int
    heads: int
    index: int
    layers: int
    positions: nn.Module | None
    kv_heads: int | tuple[int, int] | None

    def filled(self, make: Make, **changed: Any) -> nn.Module:
        """The layer that stands here: one of its own, or a MultiHead around a program."""
        here = replace(self, **changed)
        made = make(here)
        if not isinstance(made, PROGRAMS):
            return made
        return MultiHead(made, here.width, here.heads, kv_heads=here.kv_heads, positions=here.positions)


Make = Callable[[Place], nn.Module]


class Block(nn.Module):
    """Attention, cross-attention if there is one, and a perceptron: each on a normalized input, added to the stream."""

    def __init__(self, attention: nn.Module, width: int, cross: nn.Module | None = None):
        super().__init__()
        self.before, self.between = nn.RMSNorm(width), nn.RMSNorm(width)
        self.attention = attention
        self.beside = None if cross is None else nn.RMSNorm(width)
        self.cross = cross
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(
        self, x: Tensor, memory: Tensor | None = None, *, cache: AnyCache | None = None, keep: Tensor | None = None,
        memory_keep: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """The stream ``[B, N, width]`` after this block; ``memory [B, M, width]`` is what cross-attention reads."""
        x = x + self.attention(self.before(x), cache=cache, keep=keep)
        if self.cross is not None and self.beside is not None:
            x = x + self.cross(self.beside(x), memory, keep=memory_keep)
        return x + self.down(F.gelu(self.up(self.between(x))))


class Stack(nn.Module):
    """Blocks and a last norm: what all backbones share, and a backbone by itself for inputs that are vectors.

    Args:
        width, layers, heads: sizes.
        attention: see the module.
        causal: of the default program; and a system that looks ahead is refused.
        positions: of self-attention, as :class:`GPT`'s; all layers share them.
        kv_heads: as :class:`MultiHead`'s.
        cross: the program of cross-attention, as ``attention``; ``False``: there is none.
    """

    def __init__(
        self, width: int, layers: int, heads: int, attention: Mechanism = None, *, causal: bool = False,
        positions: Positions = None, kv_heads: int | tuple[int, int] | None = None, cross: Mechanism = False,
    ):  # fmt: skip
        super().__init__()
        own = mechanism(attention, causal)
        other = None if cross is False else mechanism(cross, False)
        here = Place(width, heads, 0, layers, turning(positions), kv_heads)
        self.blocks = nn.ModuleList()
        for index in range(layers):
            place = replace(here, index=index)
            beside = None if other is None else place.filled(other, positions=None)
            self.blocks.append(Block(place.filled(own), width, beside))
        self.last = nn.RMSNorm(width)

    def forward(
        self, x: Tensor, memory: Tensor | None = None, *, caches: Sequence[AnyCache] | None = None,
        keep: Tensor | None = None, memory_keep: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Last states ``[B, N, width]`` of a stream ``[B, N, width]``; one cache for each block."""
        for i, block in enumerate(self.blocks):
            cache = None if caches is None else caches[i]
            x = block(x, memory, cache=cache, keep=keep, memory_keep=memory_keep)
        return self.last(x)

    def caches(self) -> list[AnyCache]:
        """An empty cache for each block. Raises: Unsupported if a layer of its own has none."""
        layers: list[Any] = [block.attention for block in self.blocks]
        without = [type(layer).__name__ for layer in layers if not hasattr(layer, "cache")]
        if without:
            raise Unsupported(f"{without[0]} has no cache() to decode with")
        return [layer.cache() for layer in layers]

    @property
    def additions(self) -> int:
        """How often the blocks add to the stream, see :func:`saccade.nn.init.initialise`."""
        return sum(2 if block.cross is None else 3 for block in self.blocks)


def turning(positions: Positions) -> nn.Module | None:
    """The positions that act on queries and keys; ``None`` where they act on embeddings or there are none."""
    if positions == "rope":
        return RoPE()
    if isinstance(positions, str):
        raise SpecError(f'positions= takes "rope", a module of saccade.nn.positions, or None; got {positions!r}')
    return None if isinstance(positions, Learned) else positions


def mechanism(attention: Mechanism, causal: bool) -> Make:
    """``attention=`` as a function of a place, to a program or a layer.

    Raises:
        SpecError: no such system, one that is no program, or one that looks ahead where ``causal`` is asked for.
    """
    if attention is None:
        return lambda place: Attention(mask=Causal() if causal else Full())
    if isinstance(attention, str):
        from ..catalog import find  # names alone need the catalogue, which stands above the layers

        system = find(attention)
        attention = system(**{"causal": causal}) if "causal" in system.settings() else system()
    if isinstance(attention, nn.Module):
        return lambda place: copy.deepcopy(attention)
    if hasattr(attention, "promised"):
        if causal and not attention.promised().causal:
            raise SpecError(f"{attention!r} does not promise to be causal: give it to an Encoder, or as a function")
        return functools.partial(_of_system, attention)
    if callable(attention):
        return lambda place: attention(place.index, place.heads)
    raise SpecError(
        "attention= takes a slug, a system, a saccade.Attention, or a function of (layer, heads); got"
        f" {type(attention).__name__}"
    )


def _of_system(system: Any, place: Place) -> nn.Module:
    if hasattr(system, "layer"):
        return system.layer(place)
    try:
        return system.build(place.heads)
    except NotImplementedError as error:
        raise SpecError(f"{system!r} is no attention that a layer could have: {error}") from error


class _Model(nn.Module):
    """What the backbones share: where positions act, and a look at the layers."""

    @property
    def attentions(self) -> list[MultiHead]:
        """Every multi-head attention, in order; its ``spec`` is its program."""
        return [m for m in self.modules() if isinstance(m, MultiHead)]


class Tokens(nn.Module):
    """Embeddings ``[B, N, width]`` of tokens ``[B, N]``, with :class:`~saccade.nn.positions.Learned` ones if given."""

    def __init__(self, vocab: int, width: int, positions: Positions):
        super().__init__()
        self.table = nn.Embedding(vocab, width)
        self.positions = positions if isinstance(positions, Learned) else None

    def forward(self, tokens: Tensor, start: int = 0) -> Tensor:
        """The first token stands at ``start``."""
        x = self.table(tokens)
        return x if self.positions is None else self.positions(x, start)


class GPT(_Model):
    """A causal language model: tokens ``[B, N]`` to logits ``[B, N, vocab]``; one table embeds and tells.

    Args:
        vocab, width, layers, heads: sizes.
        attention: see the module.
        positions: ``"rope"``, a module of :mod:`saccade.nn.positions` (``Learned`` as in GPT-2), or ``None``.
        kv_heads: as :class:`MultiHead`'s.
        init: first weights, see :mod:`saccade.nn.init`.
    """

    def __init__(
        self, vocab: int, width: int = 64, layers: int = 4, heads: int = 4, *, attention: Mechanism = None,
        positions: Positions = "rope", kv_heads: int | tuple[int, int] | None = None, init: str = "gpt2",
    ):  # fmt: skip
        super().__init__()
        seed = fresh_seed()
        self.embed = Tokens(vocab, width, positions)
        self.stack = Stack(width, layers, heads, attention, causal=True, positions=positions, kv_heads=kv_heads)
        initialise(self, init, seed)

    def forward(self, tokens: Tensor, caches: Sequence[AnyCache] | None = None) -> Tensor:
        """Logits of each next token ``[B, N, vocab]``; with caches, of tokens after those that they hold."""
        return self.states(tokens, caches) @ self.embed.table.weight.T

    def states(self, tokens: Tensor, caches: Sequence[AnyCache] | None = None) -> Tensor:
        """Last hidden states ``[B, N, width]``."""
        return self.stack(self.embed(tokens, caches[0].length if caches else 0), caches=caches)

    def caches(self) -> list[AnyCache]:
        """An empty cache for each layer."""
        return self.stack.caches()

    @torch.no_grad()
    def generate(self, tokens: Tensor, count: int) -> Tensor:
        """The ``count`` likeliest tokens, one after the other, after tokens ``[B, N]``: ``[B, count]``."""
        caches, found = self.caches(), []
        for _ in range(count):
            tokens = self(tokens, caches)[:, -1:].argmax(-1)
            found.append(tokens)
        return torch.cat(found, 1)

    @torch.no_grad()
    def inside(self, tokens: Tensor) -> Iterator[tuple[Attention, Tensor, Tensor]]:
        """Program, queries and keys of each layer that has them, as it reads the tokens, to look at the weights."""
        x = self.embed(tokens)
        for block in self.stack.blocks:
            assert isinstance(block, Block)
            layer = block.attention
            if isinstance(layer, MultiHead) and isinstance(layer.spec, Attention):
                yield layer.spec, *layer.placed(block.before(x))[:2]
            x = block(x)


class Encoder(_Model):
    """Tokens ``[B, N]`` to states ``[B, N, width]``, or with ``classes`` to logits ``[B, classes]`` of their mean.

    Arguments as :class:`GPT`'s.
    """

    def __init__(
        self, vocab: int, width: int = 64, layers: int = 4, heads: int = 4, *, classes: int | None = None,
        attention: Mechanism = None, positions: Positions = "rope", init: str = "bert",
    ):  # fmt: skip
        super().__init__()
        seed = fresh_seed()
        self.embed = Tokens(vocab, width, positions)
        self.stack = Stack(width, layers, heads, attention, positions=positions)
        self.head = None if classes is None else nn.Linear(width, classes)
        initialise(self, init, seed)

    def forward(self, tokens: Tensor, keep: Tensor | None = None) -> Tensor:
        """States or logits; ``keep``: bool ``[B, N]``, which are tokens and not padding."""
        states = self.stack(self.embed(tokens), keep=keep)
        return states if self.head is None else self.head(mean(states, keep))


class EncoderDecoder(_Model):
    """Sequence to sequence: source ``[B, M]`` and target so far ``[B, N]`` to logits ``[B, N, vocab]`` of what follows.

    ``attention``, ``decoder`` and ``cross`` are the programs of the encoder, of the decoder's self-attention and of its
    cross-attention; other arguments as :class:`GPT`'s. Source and target share one table.
    """

    def __init__(
        self, vocab: int, width: int = 64, layers: int = 2, heads: int = 4, *, attention: Mechanism = None,
        decoder: Mechanism = None, cross: Mechanism = None, positions: Positions = "rope", init: str = "xavier",
    ):  # fmt: skip
        super().__init__()
        seed = fresh_seed()
        self.embed = Tokens(vocab, width, positions)
        self.encoder = Stack(width, layers, heads, attention, positions=positions)
        self.decoder = Stack(width, layers, heads, decoder, causal=True, positions=positions, cross=cross)
        initialise(self, init, seed)

    def forward(self, source: Tensor, target: Tensor, keep: Tensor | None = None) -> Tensor:
        """Logits ``[B, N, vocab]``; ``keep``: bool ``[B, M]``, which of the source are tokens and not padding."""
        return self.decode(target, self.encode(source, keep), keep)

    def encode(self, source: Tensor, keep: Tensor | None = None) -> Tensor:
        """What the decoder reads ``[B, M, width]``."""
        return self.encoder(self.embed(source), keep=keep)

    def decode(
        self, target: Tensor, memory: Tensor, keep: Tensor | None = None, caches: Sequence[AnyCache] | None = None
    ) -> Tensor:
        """Logits ``[B, N, vocab]`` of what follows each of the target; with caches, of tokens after what they hold."""
        x = self.embed(target, caches[0].length if caches else 0)
        return self.decoder(x, memory, caches=caches, memory_keep=keep) @ self.embed.table.weight.T

    @torch.no_grad()
    def generate(self, source: Tensor, first: int, count: int, keep: Tensor | None = None) -> Tensor:
        """The ``count`` likeliest tokens, one after the other, after ``first``: ``[B, count]``."""
        memory, caches, found = self.encode(source, keep), self.decoder.caches(), []
        tokens = torch.full((len(source), 1), first, device=source.device)
        for _ in range(count):
            tokens = self.decode(tokens, memory, keep, caches)[:, -1:].argmax(-1)
            found.append(tokens)
        return torch.cat(found, 1)


class ViT(_Model):
    """Images ``[B, channels, height, width]`` to logits ``[B, classes]`` of the mean over patches.

    There is no class token, so the stream is the grid of patches, row by row (``grid``: rows and columns).

    Args:
        classes: how many.
        size: pixels of an image, one number or (height, width).
        patch: pixels of a patch's side.
        channels: of an image.
        width, layers, heads, attention, init: as :class:`GPT`'s.
    """

    def __init__(
        self, classes: int, size: int | tuple[int, int] = 32, patch: int = 4, channels: int = 3, width: int = 64,
        layers: int = 4, heads: int = 4, *, attention: Mechanism = None, init: str = "vit",
    ):  # fmt: skip
        super().__init__()
        seed = fresh_seed()
        high, wide = (size, size) if isinstance(size, int) else size
        if high % patch or wide % patch:
            raise SpecError(f"images of {high} x {wide} pixels cannot be cut into patches of {patch}")
        self.grid = high // patch, wide // patch
        self.patches = nn.Conv2d(channels, width, patch, patch)
        self.positions = Learned(self.grid[0] * self.grid[1], width)
        self.stack = Stack(width, layers, heads, attention)
        self.head = nn.Linear(width, classes)
        initialise(self, init, seed)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, classes]``."""
        return self.head(self.states(images).mean(1))

    def states(self, images: Tensor) -> Tensor:
        """Last hidden states of the patches ``[B, rows * columns, width]``."""
        return self.stack(self.positions(self.patches(images).flatten(2).mT))


def mean(states: Tensor, keep: Tensor | None) -> Tensor:
    """Mean ``[B, width]`` over the tokens that are kept."""
    if keep is None:
        return states.mean(1)
    share = keep.to(states.dtype) / keep.sum(1, keepdim=True).clamp(min=1)
    return (share[:, None] @ states.masked_fill(~keep[..., None], 0))[:, 0]
