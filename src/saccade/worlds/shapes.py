"""Shapes in clutter: which of six shapes is in the picture, and which pixels are it.

    disc, ring, square, triangle, cross, bar

A shape of random colour, size, place and slight turn lies on dark noisy ground among crumbs of like colours,
too small to be told apart. With more than one ``objects`` the shapes in a picture differ, and none covers another, so
that an explanation of one class can be told from one of another.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .batches import UNLABELLED, batch, expect

__all__ = ["CLASSES", "CRUMBS", "Scene", "batch", "shapes"]

CRUMBS = 6  # in a picture, each with a radius of 1 to 2 pixels
TILT = math.pi / 12  # greatest turn of a shape, in radians: a tiny transformer learns upright shapes in minutes
TRIES = 50  # to find room for a shape
NOISE = 0.08  # standard deviation of the ground and of every surface
OUTLINES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # of coordinates in which the shape's radius is 1
    "disc": lambda x, y: x.square() + y.square() < 0.75,
    "ring": lambda x, y: ((x.square() + y.square()).sqrt() - 0.72).abs() < 0.24,
    "square": lambda x, y: torch.maximum(x.abs(), y.abs()) < 0.72,
    "triangle": lambda x, y: (y < 0.55) & (2 * x.abs() < y + 1.1),
    "cross": lambda x, y: (torch.minimum(x.abs(), y.abs()) < 0.28) & (torch.maximum(x.abs(), y.abs()) < 0.92),
    "bar": lambda x, y: (x.abs() < 0.95) & (y.abs() < 0.25),
}
CLASSES = tuple(OUTLINES)


@dataclass(frozen=True, eq=False)
class Scene:
    """pixels: float32 [3, side, side] in 0 to 1. classes: int64 [objects]. masks: bool [objects, side, side]."""

    pixels: Tensor
    classes: Tensor = field(metadata=UNLABELLED)
    masks: Tensor


def shapes(seed: int | str, *, side: int = 32, objects: int = 1) -> Iterator[Scene]:
    """Endless scenes.

    Args:
        seed: of everything.
        side: pixels of a side, from 16.
        objects: different shapes in a picture, 1 to 4; with more they are smaller.

    Raises:
        ValueError: a setting out of its range.
    """
    expect("shapes", "side", side, 16)
    expect("shapes", "objects", objects, 1, 4)
    source = torch.Generator().manual_seed(random.Random(f"shapes/{seed}").getrandbits(63))
    while True:
        yield _scene(source, side, objects)


def _scene(source: torch.Generator, side: int, objects: int) -> Scene:
    def uniform(low: float, high: float, *size: int) -> Tensor:
        return low + (high - low) * torch.rand(size, generator=source)

    y, x = torch.meshgrid(torch.arange(side) + 0.5, torch.arange(side) + 0.5, indexing="ij")
    ground = uniform(0.05, 0.35, 3)
    pixels = ground[:, None, None].expand(3, side, side).clone()

    def colour() -> Tensor:
        """A brighter one, by at least a third of the range in each channel."""
        return (ground + uniform(0.33, 0.65, 3))[:, None]

    crumbs = zip(
        uniform(0, side, CRUMBS).tolist(), uniform(0, side, CRUMBS).tolist(), uniform(1, 2, CRUMBS), strict=True
    )
    for cx, cy, radius in crumbs:
        pixels[:, (x - cx).square() + (y - cy).square() < radius.square()] = colour()

    classes = torch.randperm(len(CLASSES), generator=source)[:objects]
    largest = side * (0.34 if objects == 1 else 0.24)
    taken, masks = torch.zeros(side, side, dtype=torch.bool), []
    for number in classes.tolist():
        for _ in range(TRIES):
            radius = float(uniform(0.6, 1)) * largest
            cx, cy = uniform(radius * 0.8, side - radius * 0.8, 2).tolist()
            angle = float(uniform(-TILT, TILT))
            across, down = (x - cx) / radius, (y - cy) / radius
            u = math.cos(angle) * across + math.sin(angle) * down
            v = math.cos(angle) * down - math.sin(angle) * across
            mask = OUTLINES[CLASSES[number]](u, v)
            if not bool((mask & taken).any()):
                break
        else:
            return _scene(source, side, objects)  # the others left no room
        pixels[:, mask] = colour()
        taken = taken | (across.square() + down.square() < 1)
        masks.append(mask)
    noisy = pixels + NOISE * torch.randn(pixels.shape, generator=source)
    return Scene(noisy.clamp(0, 1), classes, torch.stack(masks))
