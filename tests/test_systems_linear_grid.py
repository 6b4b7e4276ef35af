"""rala, flatten, inline, agent: linear attention of images against its equations, written out over all pairs."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from saccade import SpecError, Unsupported
from saccade.nn import ViT
from saccade.nn.backbones import Place
from saccade.systems.linear import _pictures
from saccade.systems.linear._grid import sides
from saccade.systems.linear.agent import Agent
from saccade.systems.linear.flatten import FLatten, maps_of
from saccade.systems.linear.inline import InLine, _relu_weights, confusion, weights
from saccade.systems.linear.rala import RALA, effective_rank, layer_ranks, turn

WIDTH, HEADS, ROWS, COLUMNS = 24, 3, 4, 6
N = ROWS * COLUMNS
SYSTEMS = {
    "agent": Agent(4, (ROWS, COLUMNS)),
    "rala": RALA(ROWS),
    "flatten": FLatten(N, rows=ROWS),
    "inline": InLine(ROWS),
}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer_of(system):
    torch.manual_seed(0)
    layer = system.layer(Place(WIDTH, HEADS, 0, 2, None, None)).double()
    with torch.no_grad():
        for i, p in enumerate(layer.parameters()):
            p.copy_(draw(*p.shape, seed=i) / math.sqrt(p.shape[-1]))
    return layer


def linear(m, x):
    return x @ m.weight.T + m.bias


def by_heads(x):
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def around(v, kernels, biases):
    """Of values ``[B, N, width]``: at each patch the sum over its neighbours times a kernel ``[width, s, s]``."""
    size = kernels.shape[-1]
    out = torch.zeros_like(v)
    for i in range(N):
        for dy in range(size):
            for dx in range(size):
                y, x = i // COLUMNS + dy - size // 2, i % COLUMNS + dx - size // 2
                if 0 <= y < ROWS and 0 <= x < COLUMNS:
                    out[:, i] += kernels[..., dy, dx] * v[:, y * COLUMNS + x]
    return out + biases


def test_rala_is_its_equation():
    layer, x = layer_of(SYSTEMS["rala"]), draw(2, N, WIDTH)
    width = WIDTH // HEADS
    q, k = (by_heads(F.elu(linear(m, x)) + 1) for m in (layer.q, layer.k))
    v = linear(layer.v, x)
    matter = (q.mean(2, keepdim=True) @ k.mT / math.sqrt(width)).softmax(-1) * N  # of each key
    speeds = [1.0, 1e-4]  # of the two pairs by row, and of the two by column
    products = torch.zeros(2, HEADS, N, N, dtype=torch.float64)
    for pair in range(4):
        place = torch.arange(N) // COLUMNS if pair < 2 else torch.arange(N) % COLUMNS
        angle = (place[:, None] - place) * speeds[pair % 2]
        (a, b), (c, d) = ((z[..., 2 * pair], z[..., 2 * pair + 1]) for z in (q, k))
        same = a[..., :, None] * c[..., None, :] + b[..., :, None] * d[..., None, :]
        crossed = b[..., :, None] * c[..., None, :] - a[..., :, None] * d[..., None, :]
        products += same * angle.cos() - crossed * angle.sin()  # (turned q) . (turned k)
    out = (products * matter) @ by_heads(v) / ((q @ k.mT * matter).sum(-1, keepdim=True) + N * 1e-6)
    local = around(v, layer.convolution.weight[:, 0], layer.convolution.bias)
    want = linear(layer.out, (out.transpose(1, 2).flatten(2) + local) * linear(layer.through, x))
    assert_close(layer(x), want)


def test_flatten_is_its_equation():
    layer, x = layer_of(SYSTEMS["flatten"]), draw(2, N, WIDTH)
    scale = (1 + layer.scale.exp()).log()

    def focus(y):
        y = (y.clamp(min=0) + 1e-6) / scale
        return y**3 * (y.norm(dim=-1) / (y**3).norm(dim=-1))[..., None]

    q, k = by_heads(focus(linear(layer.q, x))), by_heads(focus(linear(layer.k, x) + layer.place))
    v = linear(layer.v, x)
    w = q @ k.mT
    out = (w / (w.sum(-1, keepdim=True) + N * 1e-6)) @ by_heads(v)
    local = around(v, layer.convolution.weight[:, 0].repeat(HEADS, 1, 1), layer.convolution.bias.repeat(HEADS))
    assert_close(layer(x), linear(layer.out, out.transpose(1, 2).flatten(2) + local))


def test_inline_is_its_equation():
    layer, x = layer_of(SYSTEMS["inline"]), draw(2, N, WIDTH)
    q, k = by_heads(linear(layer.q, x)), by_heads(linear(layer.k, x))
    v = linear(layer.v, x)
    scores = q @ k.mT / (N * math.sqrt(WIDTH // HEADS))
    w = scores - scores.sum(-1, keepdim=True) / N + 1 / N
    assert_close(weights(q, k), w)
    assert_close(w.sum(-1), torch.ones_like(w[..., 0]))
    first, _, last = layer.near
    kernels = torch.zeros(2, WIDTH, 9, dtype=torch.float64)
    inner = WIDTH // HEADS
    for h in range(HEADS):  # each head's share of the mean token through a perceptron of its own
        own = slice(h * inner, (h + 1) * inner)
        hidden = F.gelu(x.mean(1)[:, own] @ first.weight[own, :, 0].T + first.bias[own])
        wide = slice(9 * h * inner, 9 * (h + 1) * inner)
        kernels[:, own] = (hidden @ last.weight[wide, :, 0].T + last.bias[wide]).unflatten(-1, (inner, 9))
    local = around(v, kernels.unflatten(-1, (3, 3)), 0.0)
    out = (w @ by_heads(v)).transpose(1, 2).flatten(2) + local
    assert_close(layer(x), linear(layer.out, out))


def test_inline_tells_queries_apart_that_division_confuses():
    assert confusion(_relu_weights) < 1e-12
    assert confusion(weights) > 0.01


def pooled(x):
    """Averages over four cells of two rows by three columns."""
    cells = x.unflatten(1, (2, 2, 2, 3)).mean((2, 4))
    return cells.flatten(1, 2)


def stretched(block):
    """Bilinear interpolation of ``[H, A, 7, 7]`` at the middles of the patches: ``[H, A, N]``."""

    def toward(count):
        place = ((torch.arange(count) + 0.5) * 7 / count - 0.5).clamp(0, 6).double()
        return (1 - (place[:, None] - torch.arange(7)).abs()).clamp(min=0)

    return (toward(ROWS) @ block @ toward(COLUMNS).T).flatten(-2)


@pytest.mark.parametrize("trained", [True, False])
def test_agent_is_its_equation(trained):
    layer = layer_of(Agent(4, (ROWS, COLUMNS), trained, sharpness=0.3, shortcut=0.075))
    x, width = draw(2, N, WIDTH), WIDTH // HEADS
    q, k, v = (linear(m, x) for m in (layer.q, layer.k, layer.v))
    agents = by_heads(pooled(q))
    first = agents @ by_heads(k).mT / math.sqrt(width)
    second = by_heads(q) @ agents.mT * width**-0.15
    local = torch.zeros_like(v)
    if trained:
        biases = []
        for bias in (layer.gather, layer.give):
            block, row, column = (m.weight.unflatten(0, (HEADS, 4)) for m in (bias.block, bias.row, bias.column))
            own = row.repeat_interleave(COLUMNS, -1) + column.repeat(1, 1, ROWS)
            biases.append(stretched(block.unflatten(-1, (7, 7))) + own)
        first, second = first + biases[0], second + biases[1].mT
        local = around(v, layer.convolution.weight[:, 0], layer.convolution.bias)
    out = second.softmax(-1) @ first.softmax(-1) @ by_heads(v)
    want = out.transpose(1, 2).flatten(2) + 0.075 * v + local
    assert_close(layer(x), linear(layer.out, want))


def test_one_agent_per_patch_of_equal_queries_is_softmax_attention():
    layer, x = layer_of(Agent(36, trained=False)), draw(1, 36, WIDTH)
    with torch.no_grad():
        layer.q.weight.zero_()  # all queries, and so all agents, are the bias
    q, k, v = (by_heads(linear(m, x)) for m in (layer.q, layer.k, layer.v))
    want = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    assert_close(layer(x), linear(layer.out, want))


def test_agents_are_put_into_a_trained_model():
    torch.manual_seed(0)
    model = ViT(5, 12, 2, 1, WIDTH, 2, HEADS).double()
    pictures = draw(2, 1, 12, 12)
    before = model(pictures)
    changed = Agent(9, trained=False).inserted(model).double()
    old, new = (m.stack.blocks[1].attention for m in (model, changed))
    assert_close(new.q.weight, old.q.weight)
    assert not new.q.bias.any()
    assert float((changed(pictures) - before).detach().abs().max()) > 1e-7
    assert_close(model(pictures), before)
    with pytest.raises(SpecError, match="trained=False"):
        Agent(9).inserted(model)
    with pytest.raises(SpecError, match="square"):
        Agent(10).layer(Place(WIDTH, HEADS, 0, 1, None, None))


@pytest.mark.parametrize("name", SYSTEMS)
def test_layers_stand_in_a_vision_transformer_and_refuse_padding(name):
    system = SYSTEMS[name]
    model = ViT(5, (8, 12), 2, 1, WIDTH, 2, HEADS, attention=system)
    assert model.grid == (ROWS, COLUMNS)
    assert model(torch.zeros(2, 1, 8, 12)).shape == (2, 5)
    with pytest.raises(Unsupported, match="no padding"):
        layer_of(system)(draw(1, N, WIDTH), keep=torch.ones(1, N, dtype=torch.bool))


def test_sides_of_grids():
    assert sides(36) == (6, 6) and sides(2048) == (32, 64) and sides(37) == (1, 37) and sides(24, 3) == (3, 8)
    with pytest.raises(SpecError, match="no grid of 5 rows"):
        sides(24, 5)


def test_turning_depends_on_the_way_between_patches():
    q, k = draw(1, 1, 1, 8).expand(1, 1, N, 8), draw(1, 1, 1, 8, seed=1).expand(1, 1, N, 8)
    scores = (turn(q, (ROWS, COLUMNS)) @ turn(k, (ROWS, COLUMNS)).mT)[0, 0]
    assert_close(scores[0, COLUMNS + 2], scores[2 * COLUMNS + 1, 3 * COLUMNS + 3])  # one down, two right
    assert abs(float(scores[0, 1] - scores[0, COLUMNS])) > 1e-3


def test_ranks_that_are_known():
    assert float(effective_rank(torch.eye(7))) == pytest.approx(7)
    assert float(effective_rank(torch.ones(5, 6))) == pytest.approx(1, abs=1e-4)


def test_measures_of_the_claims_run_on_untrained_models():
    seen = next(_pictures.pictures(0))[0][:4]
    mechanisms = {"softmax": None, "plain": _pictures.plain(), "flatten": FLatten(_pictures.TOKENS), "rala": RALA()}
    models = {name: [_pictures.vit(how)] for name, how in mechanisms.items()}
    entropy, rank = maps_of(models["softmax"], seen)
    assert 0 < entropy <= math.log(_pictures.TOKENS) + 1e-5 and 1 <= rank <= _pictures.TOKENS
    assert maps_of(models["flatten"], seen)[1] > maps_of(models["plain"], seen)[1]
    for name in ("plain", "rala"):
        state, output = layer_ranks(models[name], seen)
        assert 1 <= state <= 16 and 1 <= output <= 48
