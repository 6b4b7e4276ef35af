"""nats-l: against its equations token by token, its two ends (all softmax, all linear), what a choice learns from."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from saccade import SpecError, Unsupported
from saccade.nn import GPT
from saccade.nn.backbones import Place
from saccade.systems.linear.nats_l import NatsL

WIDTH, HEADS, BLOCK, N = 32, 2, 5, 23  # keys of 12, softmax heads of 6, four full blocks and a rest


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer_of(heads=HEADS):
    torch.manual_seed(0)
    layer = NatsL(BLOCK).layer(Place(WIDTH, heads, 0, 1, None, None)).double()
    with torch.no_grad():
        for linear in (layer.q, layer.k, layer.v, layer.forgetting, layer.strength, layer.choose, layer.share):
            linear.weight.mul_(2)
        layer.rate.sub_(1)  # so that something is left after a block
    return layer


def rms(x):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def written_out(layer, x, chosen):
    """The equations for one sequence ``[N, width]``, token by token; ``chosen [H, blocks, 2]``."""
    taps = torch.cat([layer.q(x), layer.k(x), layer.v(x)], -1)
    mixed = []
    for t in range(len(x)):
        past = [taps[t - 3 + i] if t - 3 + i >= 0 else torch.zeros_like(taps[0]) for i in range(4)]
        mixed.append(F.silu(sum(layer.near.weight[:, 0, i] * past[i] for i in range(4))))
    q, k, v = torch.stack(mixed).split([24, 24, 48], -1)
    linear, soft = [], []
    for h in range(HEADS):
        a, b, c = q[:, 12 * h : 12 * h + 12], k[:, 12 * h : 12 * h + 12], v[:, 24 * h : 24 * h + 24]
        a, b = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (a, b))
        beta = torch.sigmoid(x @ layer.strength.weight[h])
        decay = torch.exp(-layer.rate[h].exp() * F.softplus(x @ layer.forgetting.weight[h] + layer.step[h]))
        state = kept = torch.zeros(12, 24, dtype=x.dtype)  # with this block's writing, and without
        rows = []
        for t in range(len(x)):
            state, kept = decay[t] * state, decay[t] * kept
            state = state + beta[t] * torch.outer(b[t], c[t] - state.T @ b[t])
            rows.append(state.T @ a[t] / 12**0.5)
            if (t + 1) % BLOCK == 0:
                state = kept = kept + chosen[h, t // BLOCK, 1] * (state - kept)
        linear += torch.stack(rows).split(12, -1)
    for head in range(2 * HEADS):
        a, b = (rms(y[:, 6 * head : 6 * head + 6]) for y in (q, k))
        rows = []
        for i in range(len(x)):
            raised = (a[i] @ b[: i + 1].T / 6**0.5).exp()
            factor = [
                raised.new_ones(()) if j // BLOCK == i // BLOCK else chosen[head // 2, j // BLOCK, 0]
                for j in range(i + 1)
            ]
            weights = raised * torch.stack(factor)
            rows.append(weights @ v[: i + 1, 12 * head : 12 * head + 12] / weights.sum())
        soft.append(torch.stack(rows))
    share = layer.share(q).unflatten(-1, (4, 2)).softmax(-1)
    y = [rms(linear[i]) * share[:, i, :1] + rms(soft[i]) * share[:, i, 1:] for i in range(4)]
    return layer.out(torch.cat(y, -1) * F.silu(layer.gate(x)))


def best_of(layer, x):
    """The official choice, ``[H, blocks, 2]``: argmax of a linear map of each block's mean."""
    means = torch.stack([x[i : i + BLOCK].mean(0) for i in range(0, N - BLOCK + 1, BLOCK)])
    logits = layer.choose(means).unflatten(-1, (HEADS, 2)).transpose(0, 1)
    return F.one_hot(logits.argmax(-1), 2).to(x.dtype)


def test_the_layer_is_its_equations_with_both_kinds_chosen():
    layer, x = layer_of(), draw(3, N, WIDTH)
    chosen = torch.stack([best_of(layer, row) for row in x])
    assert 0.2 < float(chosen[..., 0].mean()) < 0.8
    assert_close(layer.choices(x), chosen)
    want = torch.stack([written_out(layer, row, c) for row, c in zip(x, chosen, strict=True)])
    assert_close(layer(x), want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_choice_gets_the_gradient_of_its_factor_where_it_was_made(seed, monkeypatch):
    layer, x = layer_of(), draw(1, N, WIDTH, seed=seed)
    best, weight = best_of(layer, x[0]), draw(N, WIDTH, seed=9)
    factor = best.clone().requires_grad_()
    (want,) = torch.autograd.grad((written_out(layer, x[0], factor) * weight).sum(), factor)
    extra = torch.zeros_like(best, requires_grad=True)
    monkeypatch.setattr(layer, "choices", lambda stream: (best * (1 + extra))[None])
    (found,) = torch.autograd.grad((layer(x)[0] * weight).sum(), extra)
    assert_close(found, want * best, rtol=1e-5, atol=1e-7)
    assert float(found.abs().max()) > 1e-3


def test_the_probability_gets_it_straight_through():
    layer, x = layer_of(), draw(1, N, WIDTH)
    means = x[0, : N // BLOCK * BLOCK].unflatten(0, (-1, BLOCK)).mean(1)
    p = layer.choose(means).unflatten(-1, (HEADS, 2)).transpose(0, 1).softmax(-1)
    weight = draw(HEADS, N // BLOCK, 2, seed=3)
    ours = torch.autograd.grad((layer.choices(x)[0] * weight).sum(), layer.choose.weight)[0]
    want = torch.autograd.grad((p * best_of(layer, x[0]) * weight).sum(), layer.choose.weight)[0]
    assert_close(ours, want)


@pytest.mark.parametrize("kind", [0, 1])
def test_its_two_ends(kind, monkeypatch):
    """All blocks softmax: plain causal attention, and a state of one block; all linear: one gated delta rule."""
    layer, x = layer_of(), draw(1, N, WIDTH)
    chosen = F.one_hot(torch.full((HEADS, N // BLOCK), kind), 2).double()
    monkeypatch.setattr(layer, "choices", lambda stream: chosen[None])
    assert_close(layer(x)[0], written_out(layer, x[0], chosen), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("cuts", [[1] * N, [7, 1, 9, 6], [20, 3]])
def test_decoding_gives_what_the_whole_sequence_gives(cuts):
    layer, x = layer_of().eval(), draw(2, N, WIDTH)
    cache = layer.cache()
    with torch.no_grad():
        parts = [layer(part, cache=cache) for part in x.split(cuts, 1)]
        assert_close(torch.cat(parts, 1), layer(x), rtol=1e-6, atol=1e-8)
        chosen = layer.choices(x)[..., 0].bool()
    assert cache.length == N
    assert cache.recent.shape[1] == N % BLOCK + 3
    worth = chosen.any(1).any(0)  # blocks that any head of any sequence keeps
    assert cache.chosen.length == int(worth.sum()) * BLOCK
    assert_close(cache.open.bool(), chosen[..., worth].repeat_interleave(BLOCK, 2).repeat_interleave(2, 1))


def test_a_block_that_nobody_keeps_leaves_the_cache(monkeypatch):
    layer, x = layer_of().eval(), draw(1, N, WIDTH)
    chosen = F.one_hot(torch.tensor([[1, 0, 1, 1], [1, 0, 1, 1]]), 2).double()
    done = 0

    def choices(stream):
        nonlocal done
        full = stream.shape[1] // BLOCK
        done += full
        return chosen[None, :, done - full : done]

    monkeypatch.setattr(layer, "choices", choices)
    cache = layer.cache()
    with torch.no_grad():
        parts = [layer(part, cache=cache) for part in x.split([6, 1, 10, 6], 1)]
    assert cache.chosen.length == BLOCK
    assert_close(torch.cat(parts, 1)[0], written_out(layer, x[0], chosen), rtol=1e-5, atol=1e-7)


def test_padding_may_stand_at_the_end_alone():
    layer, x = layer_of(), draw(1, 6, WIDTH)
    keep = torch.tensor([[True, True, True, True, False, False]])
    assert_close(layer(x, keep=keep)[:, :4], layer(x[:, :4]))
    with pytest.raises(Unsupported, match="at the end"):
        layer(x, keep=keep.flip(1))


def test_official_sizes_and_first_weights():
    torch.manual_seed(0)
    layer = NatsL().layer(Place(1024, 6, 0, 1, None, None))  # natsl_340M: 6 heads of 128, 12 softmax heads
    assert (layer.q.out_features, layer.v.out_features) == (768, 1536)
    assert layer.q_norm.normalized_shape == (64,)
    assert layer.soft_norm.normalized_shape == (128,)
    projections = 1024 * (2 * 768 + 3 * 1536)
    small = 4 * 3072 + 1024 * (6 + 6 + 12) + 768 * 24 + 2 * 6 + 2 * 64 + 2 * 128
    assert sum(p.numel() for p in layer.parameters()) == projections + small
    many = NatsL().layer(Place(1536, 96, 0, 1, None, None))
    steps = F.softplus(many.step.detach())
    assert 1e-3 <= float(steps.min()) < 3e-3 < 0.03 < float(steps.max()) <= 0.1 + 1e-6
    assert 14 < float(many.rate.detach().exp().max()) <= 16
    assert math.isclose(float(many.rate.detach().exp().mean()), 8, rel_tol=0.2)


def test_it_trains_in_a_language_model():
    model = GPT(11, WIDTH, 2, HEADS, attention=NatsL(4))
    tokens = torch.randint(11, (2, N), generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    before = [block.attention.choose.weight.clone() for block in model.stack.blocks]
    losses = []
    for _ in range(8):
        loss = F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    for block, weight in zip(model.stack.blocks, before, strict=True):
        assert float((block.attention.choose.weight - weight).detach().abs().max()) > 1e-4


def test_heads_that_cannot_be_split_are_refused():
    with pytest.raises(SpecError, match="multiple of split=4"):
        NatsL(split=4).layer(Place(32, 4, 0, 1, None, None))
