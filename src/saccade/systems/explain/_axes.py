"""Directions of a model's states, from the sentences that it reads."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...worlds.text import BOS, heldout, window

SIZE = 24  # bytes of a sentence


@dataclass(frozen=True)
class Axis:
    """direction and mean ``[width]``, and the deviation of the sentences' scores; after which layer."""

    layer: int
    direction: Tensor
    mean: Tensor
    deviation: float


def sentences(count: int, seed: str) -> list[bytes]:
    """Pieces of prose, ``SIZE`` bytes each, on one line and without the marks that lines need."""
    rng = random.Random(seed)
    found: list[bytes] = []
    while len(found) < count:
        piece = window(heldout(), SIZE, rng).replace(b"\n", b" ")
        if not {*b"|01"} & {*piece}:
            found.append(piece)
    return found


@torch.no_grad()
def principal(model: Any, pieces: Sequence[bytes], layer: int) -> list[Axis]:
    """The axes of the sentences' mean states after a layer, those of most variance first."""
    tokens = torch.tensor([[BOS, *piece] for piece in pieces])
    found = [model(t, use_cache=False, output_hidden_states=True).hidden_states[layer + 1] for t in tokens.split(64)]
    states = torch.cat(found)[:, 1:].mean(1)
    mean = states.mean(0)
    directions = torch.linalg.svd(states - mean, full_matrices=False)[2]
    return [Axis(layer, d, mean, float(((states - mean) @ d).std(correction=0))) for d in directions]
