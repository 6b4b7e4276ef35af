"""Circles of addresses of n bits: how many neurons two of them share, and the exponential that comes near."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from ...core.errors import SpecError


def intersections(n: int, radius: int) -> list[int]:
    """How many addresses of n bits lie within ``radius`` of both of two, by their distance, while any do. Exact."""
    counts = [sum(math.comb(n, i) for i in range(radius + 1))]
    for distance in range(1, min(2 * radius, n) + 1):
        i = distance // 2
        lost = math.comb(2 * i, i) * math.comb(n - distance, radius - i) if distance % 2 else 0
        counts.append(counts[-1] - lost)
    return counts


def fitted_beta(n: int, radius: int) -> tuple[float, float]:
    """Slope of log I over the cosine by least squares, distances below the radius; and the R² of the line."""
    logs = torch.tensor([math.log(count) for count in intersections(n, radius)[:radius]], dtype=torch.float64)
    y, x = logs - logs.mean(), torch.arange(radius, dtype=torch.float64) * (-2 / n)
    x = x - x.mean()
    slope = (x @ y) / (x @ x)
    return float(slope), float(slope * (x @ y) / (y @ y))


def radius_of(n: int, share: float) -> int:
    """The least radius of a circle that holds this share of all addresses of n bits."""
    held = 0
    for radius in range(n + 1):
        held += math.comb(n, radius)
        if held >= share * 2**n:
            return radius
    raise SpecError(f"a circle holds a share of 0 to 1 of all addresses; got {share}")


def total_variation(n: int, radius: int, beta: float) -> float:
    """Total variation between I's weights and softmax(beta cos) of keys at every distance from 0 to n."""
    counts = intersections(n, radius)
    ours = F.pad(torch.tensor([count / sum(counts) for count in counts]).double(), (0, n + 1 - len(counts)))
    theirs = torch.softmax(beta * (1 - 2 * torch.arange(n + 1, dtype=torch.float64) / n), 0)
    return float((ours - theirs).abs().sum() / 2)
