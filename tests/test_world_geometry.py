"""Plane geometry: the solvers against brute force from the definitions, and the order of what they answer."""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations, islice, pairwise, permutations
from math import dist

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade.worlds.batches import IGNORED, batch
from saccade.worlds.geometry import Plane, hull, solve_hull, tour, triangulation
from streams import assert_streams

Exact = list[tuple[Fraction, Fraction]]


def exact(plane: Plane) -> Exact:
    return [(Fraction(x), Fraction(y)) for x, y in plane.points.tolist()]


def area(a, b, c) -> Fraction:
    return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])


def circle(a, b, c) -> tuple[Fraction, Fraction, Fraction]:
    """Centre and squared radius, from the two perpendicular bisectors."""
    d = 2 * area(a, b, c)
    (ax, ay), (bx, by), (cx, cy) = a, b, c
    p, q, r = ax * ax + ay * ay, bx * bx + by * by, cx * cx + cy * cy
    x = (p * (by - cy) + q * (cy - ay) + r * (ay - by)) / d
    y = (p * (cx - bx) + q * (ax - cx) + r * (bx - ax)) / d
    return x, y, (ax - x) ** 2 + (ay - y) ** 2


@given(points=st.integers(3, 12), seed=st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_hulls_are_what_lies_on_one_side(points: int, seed: int) -> None:
    for plane in islice(hull(points, seed), 2):
        assert plane.points.shape == (points, 2) and plane.points.dtype == torch.float32
        at = exact(plane)
        # i -> j is an edge, gone counter-clockwise, if all others lie on its left.
        follows = {
            i: j
            for i, j in permutations(range(points), 2)
            if all(area(at[i], at[j], at[k]) > 0 for k in range(points) if k not in (i, j))
        }
        expected = [min(follows)]
        while follows[expected[-1]] != expected[0]:
            expected.append(follows[expected[-1]])
        assert plane.answer.tolist() == expected and len(expected) == len(follows)


def test_points_on_an_edge_or_inside_are_no_corners() -> None:
    square = [(2, 2), (0, 4), (1, 0), (4, 4), (4, 0), (0, 0), (1, 1)]
    assert solve_hull(square) == [1, 5, 4, 3]


@given(points=st.integers(3, 9), seed=st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_triangles_are_those_whose_circle_is_empty(points: int, seed: int) -> None:
    plane = next(triangulation(points, seed))
    at = exact(plane)
    expected = set()
    for triple in combinations(range(points), 3):
        x, y, square = circle(*(at[i] for i in triple))
        if all((at[i][0] - x) ** 2 + (at[i][1] - y) ** 2 > square for i in range(points) if i not in triple):
            expected.add(triple)
    answer = [tuple(triangle) for triangle in plane.answer.tolist()]
    assert set(answer) == expected and len(answer) == len(expected)
    # In the order of the centres of the circles inside, where the bisectors of the angles meet.
    centres = []
    for triangle in answer:
        a, b, c = (complex(*plane.points[i].tolist()) for i in triangle)
        weights = abs(b - c), abs(c - a), abs(a - b)
        centre = sum(w * p for w, p in zip(weights, (a, b, c), strict=True)) / sum(weights)
        centres.append((centre.real, centre.imag))
    assert centres == sorted(centres)


def test_many_triangles_fill_the_hull() -> None:
    plane = next(triangulation(40, 0))
    at = exact(plane)
    ring = [at[i] for i in solve_hull([(int(x * 2**24), int(y * 2**24)) for x, y in at])]
    assert len(plane.answer) == 2 * 40 - 2 - len(ring)  # Euler
    whole = sum(area(ring[0], b, c) for b, c in pairwise(ring[1:]))
    assert sum(abs(area(*(at[i] for i in triangle))) for triangle in plane.answer.tolist()) == whole


@pytest.mark.parametrize("points", [3, 5, 8])
def test_no_tour_is_shorter(points: int) -> None:
    for plane in islice(tour(points, points), 6):
        at = [tuple(p) for p in plane.points.double().tolist()]

        def length(order, at=at) -> float:
            return sum(dist(at[i], at[j]) for i, j in zip(order, [*order[1:], order[0]], strict=True))

        best = min(((0, *rest) for rest in permutations(range(1, points)) if rest[0] < rest[-1]), key=length)
        assert tuple(plane.answer.tolist()) == best


def test_a_long_tour_is_not_mended_by_any_two_exchange() -> None:
    plane = next(tour(12, 0))
    order, at = plane.answer.tolist(), plane.points.tolist()
    assert sorted(order) == list(range(12)) and order[0] == 0 and order[1] < order[-1]
    for i, j in combinations(range(12), 2):
        a, b, c, d = (at[order[k % 12]] for k in (i, i + 1, j, j + 1))
        assert dist(a, b) + dist(c, d) <= dist(a, c) + dist(b, d) + 1e-9


def test_one_seed_names_one_stream_and_answers_are_padded() -> None:
    for make in (hull, triangulation, tour):
        assert_streams(lambda seed, make=make: make(6, seed))
    many = batch(hull(5, 0, most=9), 20)
    sizes = {len(plane.points) for plane in islice(hull(5, 0, most=9), 20)}
    assert sizes == {5, 6, 7, 8, 9} and many.points.shape == (20, 9, 2)
    assert bool(((many.answer != IGNORED).sum(1) >= 3).all()) and batch(triangulation(6, 0), 4).answer.shape[2] == 3


def test_what_cannot_be_made_is_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match="tour: expected points to be 3 to 12, got 13"):
        next(tour(13, 0))
    with pytest.raises(ValueError, match="hull: expected most to be at least 9, got 5"):
        next(hull(9, 0, most=5))
