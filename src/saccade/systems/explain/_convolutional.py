"""A small plain convolutional network that names shapes in clutter, for explanations of such networks.

It has no biases, so that a class's score is a sum of shares of the pixels, and no batch norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...worlds.batches import drawn

CLASSES, STEPS, BATCH, SCENES = 6, 500, 64, 3000


class Pictures(NamedTuple):
    """Of scenes: pixels ``[B, 3, 32, 32]`` around 0, labels ``[B]`` and where the shape is, bool ``[B, 32, 32]``."""

    pixels: Tensor
    labels: Tensor
    masks: Tensor


def network(width: int = 16, classes: int = CLASSES) -> nn.Sequential:
    """A fresh one: four convolutions of 3 x 3, two poolings, a mean over places, and a linear layer."""
    w = width
    return nn.Sequential(
        nn.Conv2d(3, w, 3, padding=1, bias=False), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(w, 2 * w, 3, padding=1, bias=False), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(2 * w, 4 * w, 3, padding=1, bias=False), nn.ReLU(),
        nn.Conv2d(4 * w, 4 * w, 3, padding=1, bias=False), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * w, classes, bias=False),
    )  # fmt: skip


def pictures(seed: str, count: int) -> Pictures:
    """Scenes of :mod:`saccade.worlds.shapes` with one shape."""
    from ...worlds.shapes import batch, shapes

    some = batch(shapes(seed), count)
    return Pictures(2 * some.pixels - 1, some.classes[:, 0], some.masks[:, 0])


@cache
def trained(seed: int = 0) -> tuple[nn.Sequential, float]:
    """A network after training, in eval mode, and its accuracy on pictures that it was not trained on."""
    from ...study.progress import bar
    from ...study.trainer import Recipe, Task, accuracy, fit, labelled

    known, held = pictures("cnn", SCENES), pictures("cnn/held", 256)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = network()
    task = Task(
        partial(drawn, (known.pixels, known.labels), BATCH), labelled, lambda: [(held.pixels, held.labels)], accuracy
    )
    with bar(STEPS, "training a convolutional network") as tell, torch.enable_grad():
        score = fit(model, task, Recipe(STEPS), seed, tell=tell)
    return model.eval().requires_grad_(False), score


def enlarged(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Maps ``[B, h, w]`` at the pixels of the picture, bilinear: ``[B, H, W]``."""
    return F.interpolate(maps[:, None], list(size), mode="bilinear", align_corners=False)[:, 0]


def pointing(maps: Tensor, masks: Tensor) -> Tensor:
    """The pointing game: is the greatest place of a map ``[B, h, w]``, enlarged, on the object? 1 or 0, ``[B]``."""
    places = enlarged(maps, masks.shape[-2:]).flatten(1).argmax(1, keepdim=True)
    return masks.flatten(1).gather(1, places)[:, 0].float()


def covering(maps: Tensor, masks: Tensor) -> Tensor:
    """Intersection over union of each object with as many pixels as it has, the greatest of its map: ``[B]``."""
    found = []
    for values, mask in zip(maps.flatten(1), masks.flatten(1), strict=True):
        size = int(mask.sum())
        both = mask[values.topk(size).indices].sum().double()
        found.append(both / (2 * size - both))
    return torch.stack(found)
