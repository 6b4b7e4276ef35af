"""mega: its moving average against the recurrence, its layer against the equations written out token by token."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from saccade import Unsupported
from saccade.nn import GPT
from saccade.nn.backbones import Place
from saccade.systems.linear._ema import DampedEMA, forms_apart
from saccade.systems.linear._laplace import Laplace
from saccade.systems.linear.mega import Mega

WIDTH, N = 16, 21


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def average_of(both_ways=False, dims=3, width=5):
    torch.manual_seed(0)
    return DampedEMA(width, dims, both_ways).double()


def recurrence(average, x, rows):
    """``gamma . h[t] / sqrt(n)`` for the rows of the parameters, one token after the other."""
    p, a = torch.sigmoid(average.delta[rows]), torch.sigmoid(average.alpha[rows])
    h, out = torch.zeros(len(x), *p.shape, dtype=x.dtype), []
    for t in range(x.shape[1]):
        h = (1 - p * a) * h + p * average.beta[rows] * x[:, t, :, None]
        out.append((average.gamma[rows] * h).sum(-1) / math.sqrt(p.shape[1]))
    return torch.stack(out, 1), h


def test_the_convolution_is_the_recurrence():
    average, x = average_of(), draw(2, N, 5)
    summed, state = recurrence(average, x, slice(None))
    assert_close(average(x), F.silu(summed + average.omega * x))
    assert_close(average.after(x), state)


def test_it_goes_on_from_a_state():
    average, x = average_of(), draw(2, N, 5)
    state, parts = None, []
    for part in x.split([6, 1, 1, 13], 1):
        parts.append(average(part, state))
        state = average.after(part, state)
    assert_close(torch.cat(parts, 1), average(x))
    assert_close(state, average.after(x))


def test_both_ways_is_one_average_from_each_end():
    average, x = average_of(both_ways=True), draw(2, N, 5)
    there = recurrence(average, x, slice(0, 5))[0]
    back = recurrence(average, x.flip(1), slice(5, 10))[0].flip(1)
    assert_close(average(x), F.silu(there + back + average.omega * x))


def test_one_dimension_that_forgets_at_once_is_the_token_itself():
    average = average_of(dims=1)
    with torch.no_grad():
        for p, value in ((average.delta, 40.0), (average.alpha, 40.0), (average.beta, 1.0), (average.gamma, 1.0)):
            p.fill_(value)
    x = draw(1, N, 5)
    assert_close(average(x), F.silu(x * (1 + average.omega)))


def test_first_weights_are_the_official_ones():
    average = average_of(dims=16, width=400)
    assert float(average.delta.detach().std()) == pytest.approx(0.2, rel=0.05)
    assert float(average.omega.detach().std()) == pytest.approx(1, rel=0.1)
    assert_close(average.beta.detach()[:, :4].mean(0), torch.tensor([1.0, -1, 1, -1]).double(), atol=0.01, rtol=0)
    layer = Mega().layer(Place(64, 4, 0, 1, None, None))
    assert (layer.inner, layer.values) == (16, 128)
    mixed, ends = (2 * 64 + 16 + 128) * 65, 128 * 65 + 64 * 129
    assert sum(p.numel() for p in layer.parameters()) == mixed + ends + 6 * 16 + (4 * 16 + 1) * 64


def layer_of(**settings):
    torch.manual_seed(0)
    layer = Mega(dims=3, **settings).layer(Place(WIDTH, 2, 0, 1, None, None)).double()
    with torch.no_grad():
        for p in (layer.gamma, layer.beta, layer.places):
            p.normal_(0, 0.7)
    return layer


def written_out(layer, x, causal, chunk, laplace):
    """The equations, query by query, with the bias as a function of the distance."""
    m = layer.average(x)
    u, z, r, h = F.linear(m, layer.mixed.weight, layer.mixed.bias).split([16, 4, 32, 16], -1)
    q, k = (F.silu(z) * layer.gamma[i] + layer.beta[i] for i in (0, 1))
    v = F.silu(layer.v(x))
    speed = 10_000.0 ** (-torch.arange(2, dtype=x.dtype) / 2)
    (a, b), (c, d) = (place.split(2) for place in layer.places)
    rows = []
    for i in range(x.shape[1]):
        block = i // chunk
        seen = [j for j in range(x.shape[1]) if j // chunk == block and (j <= i or not causal)]
        turn = (i - torch.tensor(seen, dtype=x.dtype))[:, None] * speed
        bias = ((a * c + b * d) * turn.cos() + (a * d - b * c) * turn.sin()).sum(-1)
        s = torch.einsum("bd,bjd->bj", q[:, i], k[:, seen])
        if laplace:
            mu, sigma = 0.707107, 0.282095  # as the official code rounds them
            w = 0.5 * (1 + torch.erf((s / len(seen) + bias - mu) / (sigma * math.sqrt(2))))
        else:
            w = (s / 4**0.5 + bias).softmax(-1)
        rows.append(torch.einsum("bj,bjd->bd", w, v[:, seen]))
    o = torch.stack(rows, 1) * F.silu(r)
    return torch.sigmoid(u) * (F.silu(h + layer.out(o)) - x)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("chunk", [None, 6])
@pytest.mark.parametrize("laplace", [True, False])
def test_the_layer_is_its_equations(causal, chunk, laplace):
    layer, x = layer_of(causal=causal, chunk=chunk, laplace=laplace), draw(2, N, WIDTH)
    assert_close(layer(x), written_out(layer, x, causal, chunk or N, laplace), rtol=1e-4, atol=1e-5)


def test_laplace_meets_the_square_of_relu():
    spec = Laplace()
    place = torch.tensor([math.sqrt(0.5)], dtype=torch.float64, requires_grad=True)
    value = spec.forward(place, None)
    (slope,) = torch.autograd.grad(value, place)
    assert_close(value.item(), 0.5)  # relu(s)^2 there
    assert_close(slope.item(), math.sqrt(2.0))  # and its slope


@pytest.mark.parametrize("chunk", [None, 6])
@pytest.mark.parametrize("laplace", [True, False])
def test_decoding_holds_no_more_than_the_chunk(chunk, laplace):
    model = GPT(11, WIDTH, 2, 2, attention=Mega(chunk=chunk, laplace=laplace, dims=3)).eval()
    tokens = torch.randint(11, (2, N), generator=torch.Generator().manual_seed(1))
    caches, whole = model.caches(), model(tokens)
    parts = [model(part, caches) for part in tokens.split([8, 1, 1, 11], 1)]
    assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)
    held = N if chunk is None else N % chunk
    assert caches[0].nbytes == 4 * 2 * (held * (2 * 4 + 32) + WIDTH * 3)


def test_a_cache_and_padding_are_refused_together():
    layer = layer_of()
    with pytest.raises(Unsupported, match="one length"):
        layer(draw(1, 3, WIDTH), cache=layer.cache(), keep=torch.ones(1, 3, dtype=torch.bool))


def test_the_claims_measure_sees_a_wrong_recurrence(monkeypatch):
    assert forms_apart(200) < 1e-5
    right = DampedEMA.after
    monkeypatch.setattr(DampedEMA, "after", lambda self, x, state=None: 0.99 * right(self, x, state))
    assert forms_apart(200) > 1e-3
