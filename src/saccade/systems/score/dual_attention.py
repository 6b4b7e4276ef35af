"""Dual attention: beside the heads that fetch what other tokens are, heads that fetch how they relate to one's own.

    sensory heads:     y[i] = Wo concat over h of sum over j of a[h, i, j] v[h, j]
    relational heads:  r[l, i, j] = (x[i] Wqr[l]) . (x[j] Wkr[l]) / sqrt(P)                      relations l = 1 .. R
                       z[i] = Wz concat over h of sum over j of b[h, i, j] (Wr[h] r[i, j] + s[j] Ws[h])
    symbols:           s[j] = softmax(x[j] Wt . templates / sqrt(D)) library                     by heads
    output:            [y; z], with softmax weights a and b from queries and keys of their own

A symbol tags who was related without saying what it is.

Paper: Disentangling and Integrating Relational and Sensory Information in Transformer Architectures, arXiv:2405.16727
Code: https://github.com/Awni00/abstract_transformer (dual_attention.py, relational_attention.py, symbol_retrieval.py;
    defaults: as many relations as relational heads, identity activation; templates and library from N(0, 1))

Differs: symbols are retrieved from what the layer is given, normalized, and by each layer with a library of its own;
their models have one retriever for all layers, of the stream before the norm. Positional and relative symbols, and
activations of relations, are left out. A cache holds the relations' keys once for every relational head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...core import masks
from ...core.errors import SpecError
from ...core.spec import Attention
from ...nn import KVCache, MultiHead, ViT
from ...nn.attention import AnyCache
from ...nn.backbones import Place
from ..base import ClaimNumbers, LayerSystem, Promises
from ._relational_heads import Relational

if TYPE_CHECKING:
    from ...worlds.relational import Task as Game

GAMES: tuple[Game, ...] = ("same", "between", "occurs")
EXAMPLES, BATCH = 1000, 50


@dataclass
class DualCache:
    """What the sensory and the relational heads hold."""

    sensory: AnyCache
    relational: AnyCache

    @property
    def length(self) -> int:
        """Tokens held."""
        return self.sensory.length

    @property
    def nbytes(self) -> int:
        """Bytes of both."""
        return self.sensory.nbytes + self.relational.nbytes


class Dual(nn.Module):
    """Sensory and relational heads side by side, ``[B, N, width]`` to ``[B, N, width]``."""

    def __init__(self, system: DualAttention, place: Place):
        super().__init__()
        related, mask = system.relational, masks.Causal() if system.causal else masks.Full()
        if place.width % place.heads or not 0 < related < place.heads:
            raise SpecError(
                f"dual-attention: of {place.heads} heads of a width of {place.width}, relational={related} must leave"
                " some of either kind, and the heads must divide the width"
            )
        width, head = place.width, place.width // place.heads
        sensory = place.heads - related
        self.sensory = MultiHead(Attention(mask=mask), width, sensory, head_width=head, positions=place.positions)
        self.sensory.out = nn.Linear(sensory * head, sensory * head, bias=False)
        symbols = system.symbols, place.heads
        self.relational = Relational(
            Attention(mask=mask), width, related, head, place.positions, symbols, system.symmetric
        )

    def forward(self, x: Tensor, *, cache: DualCache | None = None, keep: Tensor | None = None) -> Tensor:
        """As :class:`MultiHead`'s."""
        caches: tuple[Any, Any] = (None, None) if cache is None else (cache.sensory, cache.relational)
        kinds = zip((self.sensory, self.relational), caches, strict=True)
        return torch.cat([heads(x, cache=held, keep=keep) for heads, held in kinds], -1)

    def cache(self) -> DualCache:
        """An empty one."""
        return DualCache(KVCache(), KVCache())


class DualAttention(LayerSystem):
    """Settings: ``relational`` heads; ``symbols`` in the library; ``symmetric`` relations; ``causal``."""

    slug = "dual-attention"
    title = "Dual attention (sensory and relational heads)"
    paper = "https://arxiv.org/abs/2405.16727"
    code = "https://github.com/Awni00/abstract_transformer"
    promises = Promises(cross=False, hosts=())

    def __init__(self, relational: int = 2, symbols: int = 64, symmetric: bool = False, causal: bool = True):
        self.relational, self.symbols, self.symmetric, self.causal = relational, symbols, symmetric, causal

    def layer(self, place: Place) -> nn.Module:
        """Both kinds of heads."""
        return Dual(self, place)

    def claim(self) -> ClaimNumbers:
        """Relational games from a thousand examples: accuracy of this one and of a greater transformer without it."""
        from ...study.trainer import Recipe, Task, accuracy, compete, labelled
        from ...worlds.relational import pictures

        model = partial(ViT, 2, size=36, patch=12, channels=3, layers=2, heads=4, init="xavier")
        dual = DualAttention(symbols=9, symmetric=True, causal=False)  # as many symbols as cells
        contestants = {"sensory": partial(model, width=72), "dual": partial(model, width=64, attention=dual)}
        numbers: dict[str, Any] = {}
        gaps: dict[str, list[float]] = {}
        for name in GAMES:
            held = next(pictures(name, "held", 1000))
            task = Task(partial(_few, name), labelled, lambda: [held], accuracy, f"accuracy_{name}")  # noqa: B023
            result = compete(contestants, task, Recipe(300, 1e-3, (0, 1)))
            gaps[name] = [a - b for a, b in zip(result.scores["dual"], result.scores["sensory"], strict=True)]
            numbers |= result.numbers() | {f"parameters_{n}": result.parameters(n) for n in contestants}
        every = [gap for found in gaps.values() for gap in found]
        gain, error = fmean(every), stdev(every) / len(every) ** 0.5
        return ClaimNumbers.decide(
            numbers | {"gain": round(gain, 4), "gain_error": round(error, 4)},
            f"From {EXAMPLES} examples of a relational game, accuracy on others is {gain:+.1%} (standard error"
            f" {error:.1%}) from a transformer's without relational heads and with more parameters:"
            f" {', '.join(f'{name} {fmean(found):+.1%}' for name, found in gaps.items())}.",
            more_from_as_many_examples=gain > 2 * error,
            in_every_game=all(fmean(found) > 0 for found in gaps.values()),
            no_more_parameters=numbers["parameters_dual"] <= numbers["parameters_sensory"],
        )


def _few(game: Game, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The same examples over and over."""
    from ...worlds.relational import pictures

    return cycle(list(islice(pictures(game, seed, BATCH), EXAMPLES // BATCH)))
