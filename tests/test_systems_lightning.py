"""lightning, lightning-2, transnormerllm: against their equations written out over all pairs of tokens."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from saccade import linear_attention
from saccade.nn.backbones import Place
from saccade.study.probes import decoding_errors
from saccade.systems.linear import _lightning
from saccade.systems.linear.lightning import Lightning
from saccade.systems.linear.lightning_2 import Lightning2
from saccade.systems.linear.transnormerllm import LRPE, TransNormerLLM

WIDTH, HEADS, N = 24, 4, 70


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer_at(system, index, layers=3):
    torch.manual_seed(0)
    return system.layer(Place(WIDTH, HEADS, index, layers, None, None)).double()


def decayed(q, k, v, slopes):
    """``sum over s <= t of exp(-slope (t - s)) (q[t] . k[s]) v[s]``, with all pairs."""
    t = torch.arange(q.shape[2])
    gap = t[:, None] - t
    weights = torch.where(gap >= 0, torch.exp(-slopes[:, None, None] * gap), 0.0)
    return ((q @ k.mT) * weights) @ v


def by_heads(x):
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


@pytest.mark.parametrize("heads", [4, 6])
def test_slopes_are_the_official_ones(heads):
    whole = {4: [0.25, 0.0625, 0.015625, 0.00390625], 6: [0.25, 0.0625, 0.015625, 0.00390625, 0.5, 0.125]}[heads]
    assert_close(_lightning.log_decays(heads), -torch.tensor(whole))
    later = _lightning.log_decays(heads, 2, 5)  # the factor is 1 - 2 / 4 + 1e-5
    assert_close(later, -torch.tensor(whole) * 0.50001)
    assert bool(_lightning.log_decays(heads, 0, 1).isfinite().all())


@pytest.mark.parametrize("index", [0, 1, 2])
def test_lightning_is_its_equation(index):
    layer, x = layer_at(Lightning(), index), draw(2, N, WIDTH)
    slopes = torch.tensor([2.0 ** (-2 * (h + 1)) for h in range(HEADS)]) * (1 - index / 2 + 1e-5)
    q, k, v = (by_heads(F.silu(x @ m.weight.T)) for m in (layer.q, layer.k, layer.v))
    whole = decayed(q, k, v, slopes.double()).transpose(1, 2).flatten(2)
    centred = whole - whole.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    down, up = layer.gate.gate
    want = (normed * torch.sigmoid(x @ down.weight.T @ up.weight.T)) @ layer.out.weight.T
    assert_close(layer(x), want, rtol=1e-6, atol=1e-7)  # decays are held in float32


@pytest.mark.parametrize("decay", [True, False])
def test_lightning_2_and_its_gradients_are_the_definition(decay):
    slopes = torch.tensor([2.0 ** (-2 * (h + 1)) for h in range(HEADS)]).double() * decay
    spec = Lightning2(decay).program(HEADS).double()
    leaves = [draw(2, HEADS, 150, 5, seed=seed).requires_grad_() for seed in range(3)]
    weight = draw(2, HEADS, 150, 5, seed=4)
    found = linear_attention(*leaves, spec)
    want = decayed(*leaves, slopes)
    assert_close(found, want)
    grads = [torch.autograd.grad((out * weight).sum(), leaves) for out in (found, want)]
    for ours, theirs in zip(*grads, strict=True):
        assert_close(ours, theirs)


def test_lightning_2_normalizes_the_heads_together():
    layer, x = layer_at(Lightning2(), 0), draw(1, N, WIDTH)
    slopes = torch.tensor([2.0 ** (-2 * (h + 1)) for h in range(HEADS)]).double()
    whole = decayed(*(by_heads(x @ m.weight.T) for m in (layer.q, layer.k, layer.v)), slopes)
    whole = whole.transpose(1, 2).flatten(2)
    want = (whole / (whole.square().mean(-1, keepdim=True) + 1e-6).sqrt()) @ layer.out.weight.T
    assert_close(layer(x), want)


@pytest.mark.parametrize("index", [0, 1])
def test_transnormerllm_is_its_equation(index):
    layer, x = layer_at(TransNormerLLM(), index), draw(2, N, WIDTH)
    slopes = torch.tensor([2.0 ** (-2 * (h + 1)) for h in range(HEADS)]) * (1 - index / 2 + 1e-5)
    q, k = (by_heads(F.silu(x @ m.weight.T)) for m in (layer.q, layer.k))
    v = by_heads(x @ layer.v.weight.T)
    products = q[..., :, None, :] * k[..., None, :, :]  # by coordinate, so that the rotation is a cosine of the gap
    if index == 0:
        theta = torch.tensor([10_000 ** (-2 * i / WIDTH) for i in range(WIDTH)]).double().view(HEADS, 1, 1, -1)
        t = torch.arange(N)
        products = products * ((t[:, None] - t)[..., None] * theta).cos()
    else:
        assert layer.positions is None
    gap = torch.arange(N)[:, None] - torch.arange(N)
    weights = torch.where(gap >= 0, torch.exp(-slopes.double()[:, None, None] * gap), 0.0)
    whole = ((products.sum(-1) * weights) @ v).transpose(1, 2).flatten(2)
    normed = whole / (whole.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    want = (normed * (x @ layer.gate.gate.weight.T)) @ layer.out.weight.T
    assert_close(layer(x), want, rtol=1e-5, atol=1e-6)  # decays and theta are held in float32


def test_the_first_layer_decodes():
    layer, x = layer_at(TransNormerLLM(), 0), draw(1, 30, WIDTH)
    cache = layer.cache()
    parts = [layer(part, cache=cache) for part in x.split((17, 1, 1, 11), 1)]
    assert_close(torch.cat(parts, 1), layer(x))


def test_lrpe_keeps_late_positions_apart_in_bfloat16():
    x = torch.ones(1, 1, 2, 4, dtype=torch.bfloat16)
    q, _ = LRPE(1, 4).bfloat16()(x, x, start=1000)
    assert_close(q[0, 0, :, 0].float(), torch.tensor([math.cos(1000), math.cos(1001)]), atol=4e-3, rtol=0)


def test_decoding_in_low_precision_stays_near():
    early, late = decoding_errors(layer_at(TransNormerLLM(), 0), WIDTH, 256)
    assert 1e-4 < early < 0.05 and 1e-4 < late < 0.05


def test_even_means_within_a_tenth():
    assert _lightning.even({1: 1.0, 2: 1.2}) and _lightning.even({1: 1.0, 2: 0.83})
    assert not _lightning.even({1: 1.0, 2: 1.25}) and not _lightning.even({1: 1.0, 2: 0.8})
