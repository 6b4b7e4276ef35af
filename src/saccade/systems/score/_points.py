"""Problems of points in the plane as a pointer network is given them, and how its answers are judged.

A judge of ``(network, problems)`` lets the network answer; what it measures is a function of the answers alone.

An answer counts points from 1; 0 is its end. Pointers ``[B, M]`` and true answers are written alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import cycle
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...worlds.batches import IGNORED

if TYPE_CHECKING:
    from ...study.trainer import Task

BATCH, HELD = 128, 512  # problems in training and of each size to be judged by

Posed = tuple[Tensor, Tensor, Tensor]
"""Points ``[B, N, 2]``, the answer ``[B, M]``, and the labels ``[B, M + 1]`` with its end."""


def posed(stream: Iterator[Any], size: int) -> Posed:
    """The next problems of a world of :mod:`saccade.worlds.geometry`, of one number of points."""
    from ...worlds.geometry import batch

    given = batch(stream, size)
    answer = given.answer.flatten(1)
    told, there = answer.clamp(min=-1) + 1, answer >= 0
    labels = F.pad(told.masked_fill(~there, IGNORED), (0, 1), value=IGNORED)
    return given.points, told, labels.scatter(1, there.sum(1, keepdim=True), 0)


def mixed(world: Callable[..., Iterator[Any]], sizes: tuple[int, ...], batch: int, seed: int) -> Iterator[Posed]:
    """Endless batches, each of problems of one size, the sizes in turn."""
    for stream in cycle([world(n, f"{seed}/{n}") for n in sizes]):
        yield posed(stream, batch)


def problems(
    world: Callable[..., Iterator[Any]], sizes: tuple[int, ...], judge: Callable[[Any, Posed], Tensor], score: str
) -> Task:
    """To answer problems of these sizes; the score is what the judge says of others."""
    from ...study.trainer import Task, labelled

    held = [posed(world(n, "held"), HELD) for n in sizes]
    return Task(lambda seed: mixed(world, sizes, BATCH, seed), labelled, lambda: held, judge, score)


def exactness(network: Any, given: Posed) -> Tensor:
    """:func:`exact` of a network's answers."""
    points, told, _ = given
    return exact(network.solve(points, told.shape[1] + 1), told)


def area_covered(network: Any, given: Posed) -> Tensor:
    """:func:`area` of a network's hulls."""
    points, told, _ = given
    return area(points, network.solve(points, points.shape[1]), told)


def triangles_found(network: Any, given: Posed) -> Tensor:
    """:func:`covered` of a network's triangles."""
    points, told, _ = given
    return covered(network.solve(points, told.shape[1]), told)


def tour_length(network: Any, given: Posed) -> Tensor:
    """:func:`detour` of a network's tours, which must visit every point."""
    points, told, _ = given
    return detour(points, network.solve(points, told.shape[1], tour=True), told)


def exact(pointed: Tensor, told: Tensor) -> Tensor:
    """Share of the answers that are right from beginning to end, which they say one step after the longest."""
    return (pointed == F.pad(told, (0, pointed.shape[1] - told.shape[1]))).all(1).float().mean()


def area(points: Tensor, pointed: Tensor, told: Tensor) -> Tensor:
    """Area within the corners that are pointed at, relative to the hull's, one way or the other."""
    ratio = _within(points, pointed) / _within(points, told)
    return torch.minimum(ratio, 1 / ratio).mean()


def _within(points: Tensor, corners: Tensor) -> Tensor:
    """Areas ``[B]`` of polygons (shoelace formula); after its end a polygon stays at its first corner."""
    corners = torch.where(corners == 0, corners[:, :1].clamp(min=1), corners) - 1
    x, y = points.gather(1, corners[..., None].expand(-1, -1, 2)).unbind(-1)
    return (x * y.roll(-1, 1) - y * x.roll(-1, 1)).sum(1).abs() / 2


def covered(pointed: Tensor, told: Tensor) -> Tensor:
    """Share of the true triangles that are among those pointed at."""
    found, true = (x.unflatten(1, (-1, 3)) for x in (pointed, told))
    hit = (found.sort(-1).values[:, None] == true[:, :, None]).all(-1).any(-1)
    return hit[true[..., 0] > 0].float().mean()


def detour(points: Tensor, pointed: Tensor, told: Tensor) -> Tensor:
    """Length of tours, relative to the shortest."""
    return (_around(points, pointed) / _around(points, told)).mean()


def _around(points: Tensor, tour: Tensor) -> Tensor:
    """Lengths ``[B]`` of closed tours."""
    way = points.gather(1, (tour - 1)[..., None].expand(-1, -1, 2))
    return (way - way.roll(-1, 1)).norm(dim=-1).sum(1)
