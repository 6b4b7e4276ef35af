"""CoCA's layer against the paper's sum over pairs and the contraction of the official code."""

import math

import pytest
import torch
import torch.nn.functional as F
from transformers.models.llama.modeling_llama import rotate_half

from saccade.nn import GPT
from saccade.nn.backbones import Place
from saccade.nn.init import initialise
from saccade.nn.positions import RoPE
from saccade.systems.score.coca_collinear import CoCA

torch.set_num_threads(1)
WIDTH, HEADS, D, N = 32, 4, 8, 19


def made(**settings):
    layer = Place(WIDTH, HEADS, 0, 1, RoPE(), None).filled(CoCA(**settings).layer)
    initialise(layer, "xavier", 3)
    with torch.no_grad():
        layer.k.weight.mul_(3)
        layer.q.weight.mul_(2)
    x = torch.randn(2, N, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return layer.double(), x, *(p(x).unflatten(-1, (HEADS, D)).transpose(1, 2) for p in (layer.q, layer.k, layer.v))


def read(layer, scores, v):
    hidden = torch.ones(N, N).triu(1).bool()
    out = (scores / math.sqrt(D)).masked_fill(hidden, -math.inf).softmax(-1) @ v
    return layer.out(out.transpose(1, 2).flatten(2))


def speeds(base):
    return base ** (-torch.arange(D // 2, dtype=torch.float64) / (D // 2))


@pytest.mark.parametrize("base", [10_000.0, 50.0])
def test_the_layer_is_the_papers_sum_over_pairs(base):
    layer, x, q, t, v = made(base=base)
    factor = F.relu(t.unflatten(-1, (2, -1)).mean(-2))
    square = q.unflatten(-1, (2, -1)).square().sum(-2)
    away = torch.arange(N, dtype=torch.float64)[:, None] - torch.arange(N)
    scores = torch.einsum("bhmi,bhni,mni->bhmn", square, factor, torch.cos(away[..., None] * speeds(base)))
    torch.testing.assert_close(layer(x), read(layer, scores, v))


def test_official_is_the_contraction_of_the_code():
    layer, x, q, t, v = made(official=True)
    angle = torch.arange(N, dtype=torch.float64)[:, None] * speeds(10_000.0).repeat(2)
    turn = lambda a: a * angle.cos() + rotate_half(a) * angle.sin()  # noqa: E731
    factor = F.relu((t[..., : D // 2] + t[..., D // 2 :]) / 2)
    scores = torch.einsum("bpnd,bpsd,bpnd->bpns", q, turn(torch.cat([factor, factor], -1)), turn(q))
    torch.testing.assert_close(layer(x), read(layer, scores, v))
    assert (layer(x) - made()[0](x)).abs().max() > 1e-3


def test_a_pair_scores_highest_where_it_stands_and_never_below_minus_that():
    layer, x, *_ = made()
    same = x[:, :1].expand_as(x)  # one token everywhere, so that distance alone decides
    queries, keys, _ = layer.placed(same)
    scores = (queries @ keys.mT)[:, :, -1].detach()
    assert bool((scores.abs() <= scores[..., -1:] + 1e-9).all())
    assert float(scores[..., -1].max()) > 0


def test_a_model_decodes_what_it_prefills():
    torch.manual_seed(0)
    model = GPT(50, WIDTH, 2, HEADS, attention="coca-collinear").double()
    tokens = torch.randint(50, (1, N))
    caches = model.caches()
    with torch.no_grad():
        steps = torch.cat([model(part, caches) for part in tokens.split((12, 1, 6), 1)], 1)
        torch.testing.assert_close(steps, model(tokens))
