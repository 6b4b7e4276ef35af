"""In-context linear regression: pairs (x, y = w . x + noise) of one hidden w, then an x whose y is asked.

    x ~ N(0, I),   w ~ N(0, I),   noise ~ N(0, noise^2)      (Garg et al., arXiv:2208.01066)

:func:`interleaved` and :func:`joined` make the tokens of Garg et al. and of von Oswald et al. (arXiv:2212.07677; they
draw x from U(-1, 1)). References predict every y from the pairs before it, all in the dtype of their input:
:func:`least_squares` (with noise 0 the best there is), :func:`ridge` (the best with noise: the mean of the posterior),
and :func:`gradient_step`, one step from w = 0, which one layer of linear attention can make.

Code: https://github.com/dtsip/in-context-learning (src/tasks.py, src/models.py: _combine, LeastSquaresModel),
https://github.com/google-research/self-organising-systems (transformers_learn_icl_by_gd/src/data.py)
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .batches import batch, expect

__all__ = [
    "Regression",
    "batch",
    "best_rate",
    "gradient_step",
    "interleaved",
    "joined",
    "least_squares",
    "regression",
    "ridge",
]


@dataclass(frozen=True, eq=False)
class Regression:
    """xs: float32 [N, D]. ys: float32 [N], noise included. weights: float32 [D], the hidden w."""

    xs: Tensor
    ys: Tensor
    weights: Tensor


def regression(points: int, dim: int, seed: int | str, *, noise: float = 0.0) -> Iterator[Regression]:
    """Endless tasks of so many points in so many dimensions; ``noise``: its standard deviation."""
    expect("regression", "points", points, 1)
    expect("regression", "dim", dim, 1)
    expect("regression", "noise", noise, 0)
    generator = torch.Generator().manual_seed(random.Random(f"regression/{seed}").getrandbits(63))
    while True:
        weights = torch.randn(dim, generator=generator)
        xs = torch.randn(points, dim, generator=generator)
        yield Regression(xs, xs @ weights + noise * torch.randn(points, generator=generator), weights)


def interleaved(xs: Tensor, ys: Tensor) -> Tensor:
    """x_1, (y_1, 0, ...), x_2, ...: [..., N, D] and [..., N] to [..., 2 N, D]; y_i is asked at token 2 i (from 0)."""
    values = torch.cat([ys[..., None], torch.zeros_like(xs[..., 1:])], -1)
    return torch.stack([xs, values], -2).flatten(-3, -2)


def joined(xs: Tensor, ys: Tensor) -> Tensor:
    """(x_1, y_1), ..., (x_N, 0): [..., N, D] and [..., N] to [..., N, D + 1]; the last y is asked, and hidden."""
    hidden = torch.cat([ys[..., :-1], torch.zeros_like(ys[..., -1:])], -1)
    return torch.cat([xs, hidden[..., None]], -1)


def least_squares(xs: Tensor, ys: Tensor) -> Tensor:
    """[..., N]: of each x the y by the w of least norm that fits the pairs before it best; the first is 0."""
    fits = [torch.linalg.pinv(xs[..., :i, :]) @ ys[..., :i, None] for i in range(1, xs.shape[-2])]
    return _predictions(xs, fits)


def ridge(xs: Tensor, ys: Tensor, noise: float) -> Tensor:
    """[..., N]: by w = (X^T X + noise^2 I)^-1 X^T y over the pairs before; the first is 0.

    Raises:
        ValueError: without noise it is :func:`least_squares`.
    """
    if noise <= 0:
        raise ValueError(f"ridge: expected noise above 0, got {noise}: call least_squares without noise")
    penalty = noise**2 * torch.eye(xs.shape[-1], dtype=xs.dtype, device=xs.device)
    before = [(xs[..., :i, :], ys[..., :i, None]) for i in range(1, xs.shape[-2])]
    return _predictions(xs, [torch.linalg.solve(x.mT @ x + penalty, x.mT @ y) for x, y in before])


def gradient_step(xs: Tensor, ys: Tensor, rate: float) -> Tensor:
    """[..., N]: by w = rate / n * sum y_j x_j over the n pairs before; the first is 0.

    That is one step from 0 on the loss 1 / (2 n) * sum (w . x_j - y_j)^2.
    """
    before = [(xs[..., :i, :], ys[..., :i, None]) for i in range(1, xs.shape[-2])]
    return _predictions(xs, [rate * (x.mT @ y) / x.shape[-2] for x, y in before])


def best_rate(pairs: int, dim: int, noise: float = 0.0) -> tuple[float, float]:
    """The rate of a step on so many pairs whose expected squared error (without the noise of y) is least, and that.

    E |w - rate / n X^T y|^2 = D (1 - 2 rate + rate^2 (n + D + 1 + noise^2) / n), for x and w as in this world.
    """
    rate = pairs / (pairs + dim + 1 + noise**2)
    return rate, dim * (1 - rate)


def _predictions(xs: Tensor, fits: list[Tensor]) -> Tensor:
    """``fits[i]``: [..., D, 1], what x_(i+1) is multiplied with."""
    weights = torch.stack([torch.zeros_like(xs[..., 0, :]), *(fit[..., 0] for fit in fits)], -2)
    return (xs * weights).sum(-1)
