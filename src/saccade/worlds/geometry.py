"""Points of the unit square, and what a pointer network must point at, by exact solvers.

    hull           its corners, counter-clockwise, from the one with the lowest index
    triangulation  Delaunay's triangles, each with rising indices, in the order of their incenters (by x, then y)
    tour           the shortest closed tour, from the first point (dynamic programming, Held and Karp)

Coordinates are multiples of 2^-24 (exact in float32), so hulls and triangulations are decided in whole numbers.

Paper: Pointer Networks, arXiv:1506.03134 (uniform points; 5 to 50 of them for hulls, 5 to 20 for tours)

Differs: indices count from 0, and padding ends an answer; of a tour's two directions, which the paper leaves open, the
one whose second index is below its last.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import dist

import torch
from torch import Tensor

from .batches import UNLABELLED, batch, expect

__all__ = ["Plane", "batch", "hull", "solve_hull", "solve_tours", "solve_triangulation", "tour", "triangulation"]

GRID = 2**24
MOST_CITIES = 12  # of a tour: its solver takes 2^n steps
TOGETHER = 64  # tours solved at once

Point = tuple[int, int]
Solver = Callable[[list[Point]], list]


@dataclass(frozen=True, eq=False)
class Plane:
    """points: float32 [N, 2] in 0 .. 1. answer: int64 [M], or [M, 3] for triangles: indices of points."""

    points: Tensor
    answer: Tensor = field(metadata=UNLABELLED)


def hull(points: int, seed: int | str, *, most: int | None = None) -> Iterator[Plane]:
    """Endless hulls of so many points, or (``most``) of any number from ``points`` to it."""
    return _solved("hull", solve_hull, points, most, seed)


def triangulation(points: int, seed: int | str, *, most: int | None = None) -> Iterator[Plane]:
    """Endless triangulations; numbers of points as for :func:`hull`."""
    return _solved("triangulation", solve_triangulation, points, most, seed)


def tour(points: int, seed: int | str) -> Iterator[Plane]:
    """Endless tours of so many points, at most 12: about 6 ms each with 12, 1 ms with 10."""
    expect("tour", "points", points, 3, MOST_CITIES)
    rng = random.Random(f"tour/{seed}")
    while True:
        places = torch.tensor([_points(points, rng) for _ in range(TOGETHER)]) / GRID
        yield from map(Plane, places, solve_tours(places))


def _solved(name: str, solve: Solver, points: int, most: int | None, seed: int | str) -> Iterator[Plane]:
    expect(name, "points", points, 3)
    most = points if most is None else most
    expect(name, "most", most, points)
    rng = random.Random(f"{name}/{seed}")
    while True:
        places = _points(rng.randint(points, most), rng)
        yield Plane(torch.tensor(places) / GRID, torch.tensor(solve(places)))


def _points(count: int, rng: random.Random) -> list[Point]:
    return [(rng.randrange(GRID), rng.randrange(GRID)) for _ in range(count)]


def _turn(a: Point, b: Point, c: Point) -> int:
    """Twice the area of the triangle: above 0 if a, b, c turn counter-clockwise."""
    return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])


def solve_hull(points: list[Point]) -> list[int]:
    """Corners of the convex hull of points in whole numbers, by Andrew's monotone chain."""
    order = sorted(range(len(points)), key=points.__getitem__)
    corners: list[int] = []
    for way in (order, order[::-1]):  # below, then above
        chain: list[int] = []
        for i in way:
            while len(chain) > 1 and _turn(points[chain[-2]], points[chain[-1]], points[i]) <= 0:
                chain.pop()
            chain.append(i)
        corners += chain[:-1]
    first = corners.index(min(corners))
    return corners[first:] + corners[:first]


def _in_circle(a: Point, b: Point, c: Point, d: Point) -> bool:
    """Is d inside the circle through a, b, c, which turn counter-clockwise?"""
    (ax, ay), (bx, by), (cx, cy) = ((p[0] - d[0], p[1] - d[1]) for p in (a, b, c))
    aa, bb, cc = ax * ax + ay * ay, bx * bx + by * by, cx * cx + cy * cy
    return ax * (by * cc - bb * cy) - ay * (bx * cc - bb * cx) + aa * (bx * cy - by * cx) > 0


def solve_triangulation(points: list[Point]) -> list[tuple[int, ...]]:
    """Delaunay's triangles of points in whole numbers, wrapped from edge to edge; no four on one circle."""
    corners = solve_hull(points)
    edges, found = [(corners[0], corners[1])], set()
    done: set[tuple[int, int]] = set()
    while edges:
        a, b = edges.pop()
        left = [c for c in range(len(points)) if _turn(points[a], points[b], points[c]) > 0]
        if not left or (a, b) in done:
            continue
        apex = left[0]
        for c in left[1:]:  # the one whose circle holds no other
            if _in_circle(points[a], points[b], points[apex], points[c]):
                apex = c
        found.add(tuple(sorted((a, b, apex))))
        done |= {(a, b), (b, apex), (apex, a)}
        edges += [(apex, b), (a, apex)]
    return sorted(found, key=lambda triangle: _incenter(*(points[i] for i in triangle)))


def _incenter(a: Point, b: Point, c: Point) -> tuple[float, ...]:
    sides = dist(b, c), dist(c, a), dist(a, b)
    return tuple(sum(side * p[axis] for side, p in zip(sides, (a, b, c), strict=True)) / sum(sides) for axis in (0, 1))


def solve_tours(points: Tensor) -> Tensor:
    """Shortest tours of [B, N, 2], all at once: int64 [B, N], from 0 (Held and Karp, in float64)."""
    far = (points[:, :, None] - points[:, None]).double().norm(dim=-1)
    tours, others = len(points), points.shape[1] - 1
    # length[b, seen, j]: of the shortest path from 0 through the set `seen` of others, in bits, to its member j.
    length = far.new_full((tours, 1 << others, others), torch.inf)
    before = torch.zeros(length.shape, dtype=torch.long)
    for j in range(others):
        length[:, 1 << j, j] = far[:, 0, j + 1]
    for seen in range(1, 1 << others):
        inside = [j for j in range(others) if seen >> j & 1]
        if len(inside) > 1:
            rest = length[:, [seen ^ (1 << j) for j in inside]] + far[:, 1:, 1:][:, inside]
            length[:, seen, inside], before[:, seen, inside] = rest.min(-1)
    at, left = (length[:, -1] + far[:, 0, 1:]).argmin(-1), torch.full((tours,), (1 << others) - 1)
    way = [at + 1]
    while len(way) < others:
        at, left = before[torch.arange(tours), left, at], left ^ (1 << at)
        way.append(at + 1)
    there = torch.stack(way, -1)
    there = torch.where(there[:, :1] < there[:, -1:], there, there.flip(-1))
    return torch.cat([torch.zeros_like(there[:, :1]), there], -1)
