"""Four kinds of layer as one linear system: the engine against explicit matrices, and against each kind's own words."""

import pytest
import torch
import torch.nn.functional as F

from saccade import SpecError
from saccade.nn.backbones import Place
from saccade.study.laws import check
from saccade.systems.theory._dynamics import matrices, products, simulated
from saccade.systems.theory.dsf import Dsf

KINDS = ("linear", "normalized", "ssm", "lstm")


def made(kind, width=8, heads=2):
    torch.manual_seed(0)
    layer = Dsf(kind).layer(Place(width, heads, 0, 1, None, None)).double()
    for parameter in layer.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    return layer, torch.randn(2, 21, width, dtype=torch.float64)


@pytest.mark.parametrize("kind", ["normalized", "ssm", "lstm"])
def test_obeys_the_laws(kind):
    assert not [r for r in check(Dsf, {"kind": kind}) if r.status == "failed"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_engine_runs_the_system_of_the_matrices(kind):
    layer, x = made(kind)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), simulated(layer, x), atol=1e-10, rtol=1e-10)
        decay, write, read, straight = matrices(layer, x)
    states = layer.head_width**2
    assert decay.shape == (2, layer.heads, 21, states) and write.shape == (2, layer.heads, 21, states, 8)
    assert read.shape == (2, layer.heads, 21, layer.head_width, states) and straight.shape[1:] == (layer.head_width, 8)


def heads_of(weight, x, heads):
    return torch.einsum("bnw,hdw->bhnd", x, weight.unflatten(0, (heads, -1)))


def test_linear_and_normalized_divide_the_same_sum():
    """As the official code writes them: masked scores, over their row sums or over exp(n)."""
    for kind in ("linear", "normalized"):
        layer, x = made(kind)
        q, k, v = (heads_of(m.weight, x, 2) for m in (layer.q, layer.k, layer.v))
        q, k = (F.elu(q) + 1, F.elu(k) + 1) if kind == "linear" else (q, k)
        scores = (q @ k.mT).tril()
        below = scores.sum(-1, keepdim=True) if kind == "linear" else layer.step(x).exp().mT[..., None]
        out = (scores / below @ v).transpose(1, 2).flatten(2)
        torch.testing.assert_close(layer(x), out @ layer.out.weight.T)


def test_ssm_is_a_selective_scan_with_one_rate():
    layer, x = made("ssm")
    c, b, u = (heads_of(m.weight, x, 2) for m in (layer.q, layer.k, layer.v))
    delta = F.softplus(layer.step(x)).mT
    h, out = torch.zeros(2, 2, 4, 4, dtype=torch.float64), []
    for t in range(21):
        a = torch.exp(-layer.rate.exp()[:, None, None] * delta[:, :, t, None, None])
        h = a * h + delta[:, :, t, None, None] * torch.einsum("bhn,bhd->bhnd", b[:, :, t], u[:, :, t])
        out.append(torch.einsum("bhn,bhnd->bhd", c[:, :, t], h) + layer.skip[:, None] * u[:, :, t])
    torch.testing.assert_close(layer(x), torch.stack(out, 1).flatten(2) @ layer.out.weight.T)


def test_lstm_is_a_gated_recurrence_of_every_coordinate():
    layer, x = made("lstm")
    forget = torch.sigmoid(-layer.step(x)) ** layer.rate.exp()
    h, out = torch.zeros(2, 8, dtype=torch.float64), []
    for t in range(21):
        h = forget[:, t] * h + torch.sigmoid(layer.k(x[:, t])) * layer.v(x[:, t])
        out.append(torch.sigmoid(layer.q(x[:, t])) * h)
    torch.testing.assert_close(layer(x), layer.out(torch.stack(out, 1)))


def test_features_are_the_series_of_exp():
    q, k = torch.randn(2, 9, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    score = q @ k.mT
    series = 1 + score + score**2 / 2 + score**3 / 6
    torch.testing.assert_close(products(q, 3) @ products(k, 3).mT, series)


def test_refuses_what_is_no_kind():
    with pytest.raises(SpecError, match="ssm"):
        Dsf("mamba")
