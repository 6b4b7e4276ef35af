"""Neural Attention: a perceptron's scores, against its equation written out and against what one can see in advance."""

import math

import pytest
import torch

from saccade import Attention, SpecError, attention, explain, masks, weights
from saccade.nn import MultiHead
from saccade.nn.backbones import Place
from saccade.systems.score.neural_attention import INNER, WIDTH, NeuralAttention, Perceptron, Reader, _nearest

torch.set_num_threads(1)


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def perceptron(width, inner):
    torch.manual_seed(0)
    form = Perceptron(width, inner).double()
    with torch.no_grad():
        for p in form.parameters():
            p.mul_(3)  # far from uniform
    return form


def scores(form, q, k):
    """Pair by pair: both reduced, side by side, three layers."""
    n, m = q.shape[2], k.shape[2]
    a = (q @ form.query.weight.mT + form.query.bias)[:, :, :, None].expand(-1, -1, -1, m, -1)
    b = (k @ form.key.weight.mT + form.key.bias)[:, :, None].expand(-1, -1, n, -1, -1)
    hidden = torch.relu(torch.cat([a, b], -1) @ form.first.weight.mT + form.first.bias)
    return (torch.relu(hidden @ form.second.weight.mT + form.second.bias) @ form.third.weight.mT)[..., 0]


@pytest.mark.parametrize("inner", [2, 5, 8])
def test_the_program_is_the_equation(inner):
    form = perceptron(16, inner)
    q, k, v = drawn(2, 4, 21, 16), drawn(2, 4, 21, 16, seed=1), drawn(2, 4, 21, 16, seed=2)
    s = scores(form, q, k)
    w = s.masked_fill(torch.ones(21, 21).triu(1).bool(), -math.inf).softmax(-1)
    assert w.std() > 0.05
    spec = Attention(form, masks.Causal())
    torch.testing.assert_close(attention(q, k, v, spec, backend="band"), w @ v)
    torch.testing.assert_close(weights(q, k, spec), w)


def test_its_gradients_are_those_of_the_equation():
    form = perceptron(8, 4)
    q, k, v = (drawn(1, 2, 150, 8, seed=i).requires_grad_() for i in range(3))
    wanted = [q, k, v, *form.parameters()]
    expected = torch.autograd.grad((scores(form, q, k).softmax(-1) @ v).square().sum(), wanted)
    found = torch.autograd.grad(attention(q, k, v, Attention(form), backend="band").square().sum(), wanted)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_a_perceptron_finds_the_nearest_number_where_dot_products_find_the_greatest_or_the_least():
    """|u - v| is relu(u - v) + relu(v - u): inner 2 is enough, by hand."""
    form = Perceptron(1, 2).double()
    by_hand = {
        "query.weight": [[1.0], [0.0]], "key.weight": [[1.0], [0.0]], "query.bias": [0.0, 0.0], "key.bias": [0.0, 0.0],
        "first.weight": [[1.0, 0.0, -1.0, 0.0], [-1.0, 0.0, 1.0, 0.0]], "first.bias": [0.0, 0.0],
        "second.weight": [[1.0, 1.0]], "second.bias": [0.0], "third.weight": [[-100.0]],
    }  # fmt: skip
    form.load_state_dict({name: torch.tensor(value, dtype=torch.float64) for name, value in by_hand.items()})
    asked, said, labels = next(_nearest(0, 50))
    q, k = asked[:, None, :, :1].double(), said[:, None, :, :1].double()
    nearest = (q - k.mT).abs().argmin(-1)
    assert torch.equal(weights(q, k, Attention(form)).argmax(-1), nearest)
    dot = weights(q, k, Attention()).argmax(-1)
    assert ((dot == k[..., 0].argmax(-1)[..., None]) | (dot == k[..., 0].argmin(-1)[..., None])).all()
    assert 0.2 < (dot == nearest).double().mean() < 0.45
    assert torch.equal(said[..., 2:].argmax(-1).gather(1, nearest[:, 0]), labels)


def test_memory_is_a_tile_and_the_last_layer_has_no_bias():
    spec = NeuralAttention(inner=4).program(64)
    assert explain(spec, torch.empty(1, 1, 4096, 64), torch.empty(1, 1, 4096, 64)).backend == "band"
    assert sum(p.numel() for p in spec.parameters()) == 2 * (64 * 4 + 4) + (8 * 4 + 4) + (4 * 2 + 2) + 2


def test_a_layer_of_it_is_multi_head_and_too_small_an_inner_is_refused():
    place = Place(32, 4, 0, 1, None, None)
    layer = place.filled(NeuralAttention(causal=False).layer)
    assert isinstance(layer, MultiHead) and isinstance(layer.spec.form, Perceptron)
    assert Reader(NeuralAttention(INNER, causal=False).program(WIDTH))(*next(_nearest(1))[:2]).shape == (64, 8, 8)
    with pytest.raises(SpecError, match="inner=1"):
        place.filled(NeuralAttention(1).layer)
