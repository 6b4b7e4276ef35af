"""In-context regression: the pair of heads written out, its first order in omega, and how a trained layer is read."""

import pytest
import torch

from saccade import SpecError
from saccade.study.laws import check
from saccade.systems.theory._regressor import DIM, PAIRS, Regressor, contexts
from saccade.systems.theory.icl_linear_regression import MU, OMEGA, IclLinearRegression, debiased_step, paired


def test_obeys_the_laws():
    assert not [r for r in check(IclLinearRegression) if r.status == "failed"]


def drawn():
    return [t.double() for t in next(contexts(0, batch=64))]


def test_a_pair_of_heads_is_the_equation():
    x, y, q, _ = drawn()
    expected = 0
    for sign in (1, -1):
        weight = (sign * OMEGA * torch.einsum("bld,bd->bl", x, q)).softmax(-1)
        expected = expected + sign * MU * (weight * y).sum(-1)
    torch.testing.assert_close(paired(x, y, q), expected, atol=1e-6, rtol=1e-5)  # omega and mu are kept in float32


def test_to_first_order_it_is_the_debiased_step():
    x, y, q, _ = drawn()
    gaps = [(paired(x, y, q, w, 1 / w) - debiased_step(x, y, q, w, 1 / w)).abs().max() for w in (0.08, 0.04)]
    assert gaps[1] < gaps[0] / 3.3  # the next term is of the third order, over omega: a quarter
    centred = y - y.mean(1, keepdim=True)
    same = 2 * OMEGA * MU / PAIRS * torch.einsum("bl,bld,bd->b", centred, x, q)  # whichever of the two is centred
    torch.testing.assert_close(debiased_step(x, y, q), same)


def test_the_pair_beats_one_head_on_the_task():
    x, y, q, answer = next(contexts(1, batch=4000))
    single = 5**0.5 / (1 + 1.1 * 5 / PAIRS * 2.718281828)  # the official single head: omega 1 / sqrt(d)
    one = single * ((torch.einsum("bld,bd->bl", x, q) / 5**0.5).softmax(-1) * y).sum(-1)
    losses = [float((guess - answer).square().mean()) for guess in (paired(x, y, q), debiased_step(x, y, q), one)]
    assert losses[0] < losses[2] - 0.03 and losses[0] == pytest.approx(losses[1], rel=0.05)


def test_a_layer_built_by_hand_is_read_right():
    layer = Regressor(2).double()
    eye, y_alone = torch.eye(DIM + 1, dtype=torch.float64), torch.zeros(DIM + 1, DIM + 1, dtype=torch.float64)
    y_alone[-1, -1] = 1
    scale = OMEGA * (DIM + 1) ** 0.5
    layer.q.weight.data = torch.cat([scale * eye, -scale * eye])
    layer.k.weight.data = torch.cat([eye, eye])
    layer.v.weight.data = torch.cat([y_alone, y_alone])
    layer.out.weight.data = torch.tensor([[0] * DIM + [MU] + [0] * DIM + [-MU]], dtype=torch.float64)
    omega, rest, mu, others = layer.circuits()
    assert omega.tolist() == pytest.approx([OMEGA, -OMEGA]) and mu.tolist() == [MU, -MU]
    assert rest.max() < 1e-12 and others.max() == 0
    x, y, q, _ = drawn()
    torch.testing.assert_close(layer.predict(x, y, q), paired(x, y, q), atol=1e-6, rtol=1e-5)


def test_refuses_an_omega_without_a_sign_to_turn():
    with pytest.raises(SpecError, match="omega"):
        IclLinearRegression(omega=0)
