"""In-context regression: the references against torch's own solvers, autograd and their expected errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade.worlds.batches import batch
from saccade.worlds.regression import (
    best_rate,
    gradient_step,
    interleaved,
    joined,
    least_squares,
    regression,
    ridge,
)
from streams import assert_streams


def drawn(size: int, points: int, dim: int, noise: float = 0.0, seed: int = 0):
    """A batch in float64."""
    many = batch(regression(points, dim, seed, noise=noise), size)
    return many.xs.double(), many.ys.double(), many.weights.double()


@given(dim=st.integers(1, 6), points=st.integers(2, 12), seed=st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_references_equal_independent_solvers_on_every_prefix(dim: int, points: int, seed: int) -> None:
    xs, ys, _ = drawn(2, points, dim, 0.7, seed)
    square, damped, step = least_squares(xs, ys), ridge(xs, ys, 0.7), gradient_step(xs, ys, 0.3)
    assert not square[:, 0].any() and not damped[:, 0].any() and not step[:, 0].any()
    for i in range(1, points):
        for b in range(2):
            x, y, asked = xs[b, :i], ys[b, :i], xs[b, i]
            fit = torch.linalg.lstsq(x, y[:, None], driver="gelsd").solution[:, 0]
            assert abs(asked @ fit - square[b, i]) < 1e-6 * (1 + abs(square[b, i]))
            # Ridge is least squares over the pairs and one more pair (noise * e_d, 0) for each dimension.
            more = torch.cat([x, 0.7 * torch.eye(dim, dtype=x.dtype)])
            fit = torch.linalg.lstsq(more, torch.cat([y, y.new_zeros(dim)])[:, None]).solution[:, 0]
            assert abs(asked @ fit - damped[b, i]) < 1e-8
            w = torch.zeros(dim, dtype=x.dtype, requires_grad=True)
            ((x @ w - y) ** 2).mean().div(2).backward()
            assert w.grad is not None and abs(asked @ (-0.3 * w.grad) - step[b, i]) < 1e-8


def test_the_world_has_the_moments_it_says() -> None:
    xs, ys, weights = drawn(4000, 8, 3, 0.5)
    for values in (xs, weights, (ys - (xs @ weights[..., None])[..., 0]) / 0.5):
        flat = values.reshape(-1)
        assert abs(flat.mean()) < 4 / len(flat) ** 0.5 and abs(flat.var() - 1) < 4 * (2 / len(flat)) ** 0.5


def test_without_noise_least_squares_is_exact_once_there_are_enough_pairs() -> None:
    xs, ys, _ = drawn(64, 10, 5)
    error = (least_squares(xs, ys) - ys) ** 2
    assert error[:, 5:].max() < 1e-6 and (error.mean(0)[:5] > 0.05).all()


def test_with_noise_no_reference_is_better_than_ridge() -> None:
    xs, ys, weights = drawn(1500, 9, 4, 0.8)
    truth = (xs * weights[:, None]).sum(-1)
    best = ((ridge(xs, ys, 0.8) - truth) ** 2).mean(0)
    others = [ridge(xs, ys, noise) for noise in (0.3, 2.0)] + [gradient_step(xs, ys, best_rate(8, 4, 0.8)[0])]
    for other in [*others, least_squares(xs, ys)]:
        assert best[4:].mean() < ((other - truth) ** 2).mean(0)[4:].mean()


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_one_step_has_the_expected_error_and_no_other_rate_is_better(noise: float) -> None:
    pairs, dim = 12, 4
    xs, ys, weights = drawn(4000, pairs, dim, noise)
    rate, error = best_rate(pairs, dim, noise)

    def squares(rate: float) -> torch.Tensor:
        """Over x ~ N(0, I) the expected squared error of a prediction is |fit - w|^2: that of all unit x, summed."""
        units = torch.eye(dim, dtype=xs.dtype).expand(len(xs), dim, dim)
        fits = [gradient_step(torch.cat([xs, units[:, i, None]], 1), extended, rate)[:, -1] for i in range(dim)]
        return (torch.stack(fits, -1) - weights).square().sum(-1)

    extended = torch.cat([ys, torch.zeros_like(ys[:, :1])], 1)
    at_best = squares(rate)
    assert abs(at_best.mean() - error) < 3 * at_best.std() / len(at_best) ** 0.5
    for other in (rate * 0.8, rate * 1.25):
        gain = squares(other) - at_best
        assert gain.mean() > 2 * gain.std() / len(gain) ** 0.5


def test_tokens_show_what_is_known_and_nothing_more() -> None:
    xs, ys, _ = drawn(2, 4, 3)
    tokens = interleaved(xs, ys)
    assert tokens.shape == (2, 8, 3)
    assert torch.equal(tokens[:, ::2], xs) and torch.equal(tokens[:, 1::2, 0], ys) and not tokens[:, 1::2, 1:].any()
    tokens = joined(xs, ys)
    assert tokens.shape == (2, 4, 4)
    assert (
        torch.equal(tokens[..., :3], xs) and torch.equal(tokens[:, :-1, 3], ys[:, :-1]) and not tokens[:, -1, 3].any()
    )


def test_one_seed_names_one_stream_and_settings_are_checked() -> None:
    assert_streams(lambda seed: regression(5, 3, seed))
    with pytest.raises(ValueError, match="expected noise to be at least 0, got -1"):
        next(regression(5, 3, 0, noise=-1))
    with pytest.raises(ValueError, match="call least_squares without noise"):
        ridge(torch.ones(2, 1), torch.ones(2), 0.0)
