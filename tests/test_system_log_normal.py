"""log-normal: against its equations written out, the official functions' steps, and known normal distributions."""

import math

import pytest
import torch
from torch.testing import assert_close

from saccade.nn import GPT, Encoder
from saccade.nn.backbones import Place
from saccade.nn.positions import RoPE
from saccade.study.probes import shape_of_weights
from saccade.systems.linear._log_normal_features import A, B, factors, shapes
from saccade.systems.linear.log_normal import LogNormal, LogNormalAttention

WIDTH, HEADS, N = 24, 3, 37  # heads of 8: blocks of 8, and a rest of 5


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer_of(causal, kv_heads=None, positions=None):
    torch.manual_seed(0)
    layer = LogNormal(causal).layer(Place(WIDTH, HEADS, 0, 1, positions, kv_heads)).double()
    with torch.no_grad():
        for p in layer.parameters():
            p.mul_(3)
    return layer


def written_out(layer, x, spread, causal):
    """The equations of the module, pair by pair."""
    q, k, v = ((x @ m.weight.T).unflatten(-1, (-1, 8)).transpose(1, 2) for m in (layer.q, layer.k, layer.v))
    k, v = (t.repeat_interleave(HEADS // t.shape[1], 1) for t in (k, v))
    sigma = math.sqrt(((spread[0] * spread[1]) ** 2 - B) / (2 * A))
    far = torch.einsum("bhid,bhjd->bhij", (sigma / spread[0] * q).exp(), (sigma / spread[1] * k).exp())
    place = torch.arange(x.shape[1])
    seen = (place[:, None] >= place) | (not causal)
    block = seen & (place[:, None] // 8 == place // 8)
    far = far.masked_fill(~seen, 0)
    near = (q @ k.mT / 8**0.5).masked_fill(~block, -torch.inf).softmax(-1)
    out = (far / far.sum(-1, keepdim=True) + near) / 2 @ v
    return out.transpose(1, 2).flatten(2) @ layer.out.weight.T


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kv_heads", [None, 1])
def test_in_training_it_is_its_equation_with_this_batchs_spread(causal, kv_heads):
    layer, x = layer_of(causal, kv_heads).train(), draw(2, N, WIDTH)
    with torch.no_grad():
        q, k = layer.project(x, x)[:2]
    assert_close(layer(x), written_out(layer, x, (float(q.std()), float(k.std())), causal), rtol=1e-6, atol=1e-9)


def test_afterwards_the_running_mean_serves():
    layer, x = layer_of(True), draw(2, N, WIDTH)
    q, k = layer.project(x, x)[:2]
    now = torch.stack([q.std(), k.std()])
    layer.train()
    layer(x)
    assert_close(layer.spread, 0.9 + 0.1 * now)
    for _ in range(200):
        layer(x)
    assert_close(layer.spread, now)
    layer.eval()
    assert_close(layer(x[:1]), written_out(layer, x[:1], now.tolist(), True), rtol=1e-6, atol=1e-9)
    assert_close(layer.spread, now)  # not moved by looking


def test_no_gradient_goes_through_the_moments():
    layer, x = layer_of(True).train(), draw(1, N, WIDTH)
    ours = torch.autograd.grad(layer(x).sum(), layer.q.weight)[0]
    with torch.no_grad():
        q, k = layer.project(x, x)[:2]
    want = torch.autograd.grad(written_out(layer, x, (float(q.std()), float(k.std())), True).sum(), layer.q.weight)[0]
    assert_close(ours, want, rtol=1e-4, atol=1e-7)


def test_matching_solves_for_the_variance():
    spread = torch.tensor([1.3, 0.6], dtype=torch.float64)
    alpha, beta = factors(spread)
    assert_close(alpha * spread[0], beta * spread[1])
    assert_close(A * ((alpha * spread[0]) ** 2 + (beta * spread[1]) ** 2) + B, (spread.prod()) ** 2)


def test_great_keys_do_not_overflow():
    layer = layer_of(True).float().eval()
    layer.spread.fill_(30.0)
    x = 1000 * draw(1, N, WIDTH).float()
    assert bool(layer(x).isfinite().all())


def test_a_decoded_token_costs_one_block_and_a_state():
    model = GPT(11, WIDTH, 2, HEADS, attention="log-normal").eval()
    tokens = torch.randint(11, (2, N), generator=torch.Generator().manual_seed(1))
    caches = model.caches()
    whole = model(tokens)
    parts = [model(part, caches) for part in tokens.split([19, 1, 1, 16], 1)]
    assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)
    state = 2 * HEADS * 8 * 9 * 4
    assert [cache.nbytes for cache in caches] == [state + 2 * 2 * HEADS * (N % 8) * 8 * 4] * 2


def test_it_reads_both_ways_in_an_encoder():
    model = Encoder(11, WIDTH, 1, HEADS, classes=3, attention="log-normal")
    assert not model.attentions[0].spec.causal
    assert isinstance(layer_of(True, positions=RoPE()).positions, RoPE)
    assert LogNormalAttention(Place(24, 3, 0, 1, None, None)).spec.causal


def test_shapes_of_weights_that_are_known():
    place = torch.special.ndtri((torch.arange(10_000) + 0.5) / 10_000)
    weights = (0.7 * place[torch.randperm(10_000, generator=torch.Generator().manual_seed(0))]).exp().view(10, -1)
    found = shape_of_weights(weights)
    assert found["log_variance"] == pytest.approx(0.49, rel=1e-3)
    assert found["distance_from_normal"] < 1e-3
    assert shape_of_weights(torch.linspace(1, 2, 1000)[None].exp())["distance_from_normal"] > 0.03  # logs are uniform
    assert shape_of_weights(torch.full((4, 50), 0.02) + 1e-9 * torch.rand(4, 50))["concentration"] == pytest.approx(
        0, abs=1e-4
    )


def test_matched_weights_are_nearer_to_softmaxs_than_unmatched():
    found = shapes(1.25, tokens=128)
    gaps = {
        name: abs(math.log(found[name]["log_variance"] / found["softmax"]["log_variance"]))
        for name in ("matched", "unmatched")
    }
    assert gaps["matched"] < gaps["unmatched"]
