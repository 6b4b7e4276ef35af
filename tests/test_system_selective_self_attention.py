"""Selective self-attention against its equation, and the published half of it."""

import math

import pytest
import torch
import torch.nn.functional as F

from saccade.nn import GPT, MultiHead
from saccade.nn.backbones import Place
from saccade.nn.init import initialise
from saccade.systems.score import selective_self_attention as ssa
from saccade.systems.score.selective_self_attention import SelectiveSelfAttention

torch.set_num_threads(1)
WIDTH, HEADS, D, N = 32, 4, 8, 19
HIDDEN = torch.ones(N, N).triu(1).bool()


def made(content=True, position=True):
    layer = Place(WIDTH, HEADS, 0, 1, None, None).filled(SelectiveSelfAttention().layer)
    initialise(layer, "xavier", 3)
    with torch.no_grad():
        layer.q.weight.mul_(3)
        for part in (layer.sharpness, layer.loudness):
            part.beta.fill_(-1.0 if position else 20.0)
            part.token.weight.mul_(2.0 if content else 0.0)
        layer.loudness.beta.add_(0.5)
    x = torch.randn(2, N, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return layer.double(), x, [p(x).unflatten(-1, (HEADS, D)).transpose(1, 2) for p in (layer.q, layer.k, layer.v)]


def read(layer, s, v):
    out = s.masked_fill(HIDDEN, -math.inf).softmax(-1) @ v
    return layer.out(out.transpose(1, 2).flatten(2))


@torch.no_grad()
def temperature(part, z):
    """Head by head and token by token."""
    rows = torch.zeros(*z.shape[:3], 1, dtype=z.dtype)
    for h in range(HEADS):
        for n in range(N):
            token = torch.tanh(F.gelu(z[:, h, n]) @ part.token.weight[h])
            rows[:, h, n, 0] = token + 1 + math.exp(-math.exp(float(part.beta))) * math.log(n + 1)
    return rows


def test_the_layer_is_its_equation():
    layer, x, (q, k, v) = made()
    s = temperature(layer.sharpness, q) * (q @ k.mT) / math.sqrt(D)
    torch.testing.assert_close(layer(x), read(layer, s, temperature(layer.loudness, v) * v))


def test_without_content_the_queries_are_the_published_code():
    """gpt_2_PTS.py: scores times 1 + exp(-exp(beta)) log(row length), before the mask."""
    layer, x, (q, k, v) = made(content=False)
    with torch.no_grad():
        layer.loudness.beta.fill_(20.0)  # the published code leaves the values alone
    length = torch.arange(1, N + 1, dtype=torch.float64)[:, None]
    s = q @ k.mT / math.sqrt(D) * (1 + torch.exp(-torch.exp(layer.sharpness.beta)) * torch.log(length))
    torch.testing.assert_close(layer(x), read(layer, s, v))


def test_without_temperatures_it_is_multi_head_attention():
    layer, x, _ = made(content=False, position=False)
    plain = MultiHead(layer.spec, WIDTH, HEADS).double()
    plain.load_state_dict(layer.state_dict(), strict=False)
    torch.testing.assert_close(layer(x), plain(x))
    assert (made()[0](x) - plain(x)).abs().max() > 1e-2


def test_it_starts_near_multi_head_attention_with_two_vectors_per_head_more():
    torch.manual_seed(0)
    plain = GPT(50, WIDTH, 1, HEADS)
    torch.manual_seed(0)
    ours = GPT(50, WIDTH, 1, HEADS, attention="selective-self-attention")
    tokens = torch.randint(50, (1, N))
    torch.testing.assert_close(ours(tokens), plain(tokens), atol=0.02, rtol=0)
    count = [sum(p.numel() for p in model.parameters()) for model in (ours, plain)]
    assert count[0] - count[1] == 2 * HEADS * D + 2
    caches = ours.double().caches()
    with torch.no_grad():
        steps = torch.cat([ours(part, caches) for part in tokens.split((12, 1, 6), 1)], 1)
        torch.testing.assert_close(steps, ours(tokens))


def test_the_spread_of_entropies():
    torch.manual_seed(0)
    model = GPT(300, WIDTH, 1, HEADS)
    tokens = torch.randint(257, (2, 40))
    with torch.no_grad():
        model.attentions[0].q.weight.zero_()
        assert ssa._spread(model, tokens) == pytest.approx(0, abs=1e-4)  # every row uniform
        model.attentions[0].q.weight.normal_(std=3)
        assert ssa._spread(model, tokens) > 0.05
