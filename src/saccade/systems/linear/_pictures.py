"""The claims' pictures, a coloured spot in each half of the noise, and vision transformers that add their colours.

The class is the sum of the colours' numbers modulo their count: no sum over patches tells it, they have to be brought
together. (The pair itself, as in FIT's claim, plain linear attention names as well as softmax attention: it could show
nothing here.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from ...core.linear import LinearAttention, features
from ..latent._far_spots import COLOURS, SIDE, images

BATCH, STEPS, SEEDS = 32, 250, (0, 1)
PATCH, WIDTH, LAYERS, HEADS = 2, 48, 2, 3
TOKENS = (SIDE // PATCH) ** 2


def pictures(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches: pictures ``[B, 3, SIDE, SIDE]`` and the class of each ``[B]``."""
    source = torch.Generator().manual_seed(seed)
    while True:
        found, labels = images(BATCH, source)
        yield found.movedim(-1, 1), (labels // COLOURS + labels % COLOURS) % COLOURS


def vit(attention: Any) -> nn.Module:
    """A small vision transformer for them."""
    from ...nn import ViT

    return ViT(COLOURS, SIDE, PATCH, 3, WIDTH, LAYERS, HEADS, attention=attention)


def learn(mechanisms: Mapping[str, Any]) -> Any:
    """Vision transformers that differ in their attention alone, trained alike: a Comparison of accuracies."""
    from ...study.trainer import Recipe, Task, accuracy, compete, labelled

    task = Task(pictures, labelled, lambda: islice(pictures(10_000), 16), accuracy, "accuracy")
    contestants: dict[str, Callable[[], nn.Module]] = {name: partial(vit, how) for name, how in mechanisms.items()}
    return compete(contestants, task, Recipe(steps=STEPS, seeds=SEEDS))


def plain() -> LinearAttention:
    """Linear attention as it was: elu + 1, divided by the sum of the weights."""
    return LinearAttention(features.Elu1(), normalize=True, causal=False)
