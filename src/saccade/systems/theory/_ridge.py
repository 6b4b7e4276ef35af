"""How far from the truth ridge regression on given features stays, whatever they are."""

from __future__ import annotations

import torch
from torch import Tensor

RIDGES = tuple(10.0**e for e in range(-6, 3))  # penalties, relative to the greatest eigenvalue


def least_risk(x: Tensor, y: Tensor, x_test: Tensor, y_test: Tensor) -> float:
    """Squared error on the test set of ridge regression with an intercept and, of a grid, the penalty best there."""
    x, x_test, y, y_test = x.double(), x_test.double(), y.double(), y_test.double()
    mean, middle = x.mean(0), y.mean()
    x, x_test = x - mean, x_test - mean
    values, vectors = torch.linalg.eigh(x @ x.T)
    inside, across = vectors.T @ (y - middle), x_test @ x.T @ vectors
    top = values.max()
    errors = [(across @ (inside / (values.clamp(min=0) + r * top)) + middle - y_test).square().mean() for r in RIDGES]
    return float(min(errors))
