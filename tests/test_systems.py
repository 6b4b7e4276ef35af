"""Each system against numbers it did not compute: its formula in float64, entmax's package, closed forms."""

import math

import pytest
import torch
from entmax import entmax15, entmax_bisect, sparsemax
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import saccade
from saccade import catalog
from saccade.study import laws
from saccade.study.trainer import Setup
from saccade.systems.core._published import published
from saccade.systems.core.flexattention import FlexAttention
from saccade.systems.score.alpha_entmax import AlphaEntmax
from saccade.systems.score.cog import Cog, layered
from saccade.systems.score.sigmoid import Sigmoid

torch.set_num_threads(1)
EXACT = {"rtol": 1e-10, "atol": 1e-10}


@pytest.fixture
def qkv():
    source = torch.Generator().manual_seed(7)
    q = torch.randn(2, 4, 50, 12, generator=source, dtype=torch.float64)
    k, v = torch.randn(2, 2, 2, 50, 12, generator=source, dtype=torch.float64).unbind(0)
    return q, k, v


def dense(q, k, v, rows, causal=True):
    """``rows(scores) @ v`` with hidden scores at -inf."""
    k, v = (x.repeat_interleave(2, 1) for x in (k, v))
    s = torch.einsum("bhnd,bhmd->bhnm", q, k) / math.sqrt(q.shape[-1])
    if causal:
        s = s.masked_fill(torch.ones(s.shape[-2:]).triu(1).bool(), -math.inf)
    return rows(s) @ v


def gradients(out, *inputs):
    return torch.autograd.grad((out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum(), inputs)


def same_with_gradients(ours, theirs, qkv):
    """Two functions of q, k, v agree, forward and backward."""
    q, k, v = (x.requires_grad_() for x in qkv)
    a, b = ours(q, k, v), theirs(q, k, v)
    torch.testing.assert_close(a, b, **EXACT)
    for x, y in zip(gradients(a, q, k, v), gradients(b, q, k, v), strict=True):
        torch.testing.assert_close(x, y, **EXACT)


# ---- the laws, for every system of the catalogue ----

SETTINGS = [
    ("alpha-entmax", {}),
    ("alpha-entmax", {"alpha": 1.5, "causal": False}),
    ("cog", {}),
    ("cog", {"causal": False}),
    ("flexattention", {}),
    ("flexattention", {"mask_mod": None}),
    ("sigmoid", {}),
    ("sigmoid", {"length": None, "causal": False}),
]


@pytest.mark.parametrize("slug, settings", SETTINGS, ids=str)
def test_no_law_fails(slug, settings):
    results = laws.check(catalog.find(slug), settings)
    assert not [r for r in results if r.status == "failed"]
    assert sum(r.status == "passed" for r in results) >= 5


# ---- sigmoid ----


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [None, 300])
def test_sigmoid_is_the_formula(qkv, causal, length):
    spec = Sigmoid(length, causal).build(4)
    bias = -math.log(50 if length is None else length)
    same_with_gradients(
        lambda q, k, v: saccade.attention(q, k, v, spec),
        lambda q, k, v: dense(q, k, v, lambda s: 1 / (1 + torch.exp(-(s + bias))), causal),
        qkv,
    )


def test_sigmoid_rows_start_near_one_whatever_the_length():
    for n in (64, 1024):
        q, k = torch.zeros(1, 1, 1, 8, dtype=torch.float64), torch.randn(1, 1, n, 8, dtype=torch.float64)
        w = saccade.weights(q, k, Sigmoid(n).build(1))
        assert w.sum().item() == pytest.approx(n / (n + 1))  # sigmoid(-log n) is 1 / (n + 1)


def test_sigmoid_promises_decoding_only_with_a_fixed_length():
    assert Sigmoid(100).promised().decodes and not Sigmoid(None).promised().decodes
    forced = type("Forced", (Sigmoid,), {"promised": lambda self: self.promises})
    status = {r.law: r.status for r in laws.check(forced, {"length": None})}
    assert status["decoding equals prefill"] == status["a padded batch equals each alone"] == "failed"


# ---- cog ----


@pytest.mark.parametrize("causal", [True, False])
def test_cog_is_the_formula(qkv, causal):
    def rows(s):
        size = torch.exp(s.abs()).masked_fill(s == -math.inf, 0)
        return torch.sign(s) * size / size.sum(-1, keepdim=True)

    spec = Cog(causal).build(4)
    same_with_gradients(
        lambda q, k, v: saccade.attention(q, k, v, spec), lambda q, k, v: dense(q, k, v, rows, causal), qkv
    )


def test_cog_deletes_what_softmax_could_only_ignore():
    q = torch.tensor([[[[1.0]]]])
    k = torch.tensor([[[[2.0], [-2.0]]]])
    torch.testing.assert_close(saccade.weights(q, k, Cog(causal=False).build(1)).flatten(), torch.tensor([0.5, -0.5]))


def test_cog_keeps_softmax_in_the_first_and_last_layer():
    setup = Setup(layers=4)
    names = [type(layered(setup, layer).normalizer).__name__ for layer in range(4)]
    assert names == ["Softmax", "Signed", "Signed", "Softmax"]


# ---- alpha-entmax ----


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "alpha, theirs",
    [
        (1.5, lambda s: entmax15(s, dim=-1)),
        (2.0, lambda s: sparsemax(s, dim=-1)),
        (1.2, lambda s: entmax_bisect(s, alpha=1.2, n_iter=80)),
    ],
)
def test_entmax_is_the_authors(qkv, alpha, theirs, causal):
    spec = AlphaEntmax(alpha, causal=causal).build(4)
    finite = lambda s: theirs(s.masked_fill(s == -math.inf, -1e6))  # noqa: E731  (theirs knows no -inf)
    same_with_gradients(
        lambda q, k, v: saccade.attention(q, k, v, spec), lambda q, k, v: dense(q, k, v, finite, causal), qkv
    )


@pytest.mark.parametrize("causal", [True, False])
def test_the_gradient_of_a_learned_alpha_is_the_authors(qkv, causal):
    q, k, v = qkv
    spec = AlphaEntmax(causal=causal).build(4).double()
    (a,) = spec.parameters()
    own = a.detach().clone().requires_grad_()
    alpha = (1 + torch.sigmoid(own)).view(1, 4, 1, 1).expand(2, 4, 50, 1)

    def rows(s):
        return entmax_bisect(s.masked_fill(s == -math.inf, -1e6), alpha=alpha, n_iter=80)

    expected = gradients(dense(q, k, v, rows, causal), own)[0]
    for backend in ("band", "reference"):
        found = gradients(saccade.attention(q, k, v, spec, backend=backend), a)[0]
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
    assert expected.abs().min() > 1e-3


def test_alphas_start_as_told():
    torch.manual_seed(0)
    (random,) = AlphaEntmax().build(64).parameters()
    assert random.shape == (64,) and 0.7 < random.std() < 1.3
    (equal,) = AlphaEntmax(start=-1.0).build(8).parameters()
    assert equal.tolist() == [-1.0] * 8
    assert not list(AlphaEntmax(1.5).build(8).parameters())


def test_a_head_with_a_greater_alpha_has_more_zeros(qkv):
    q, k, _ = qkv
    spec = AlphaEntmax().build(4).double()
    (a,) = spec.parameters()
    with torch.no_grad():
        a.copy_(torch.tensor([-6.0, -1.0, 1.0, 6.0]))
    zeros = (saccade.weights(q[:, :1].expand(-1, 4, -1, -1), k[:, :1], spec) == 0).sum((0, 2, 3))
    assert zeros.diff().min() > 0


# ---- flexattention ----


@pytest.mark.parametrize("name", published(49, 4))
def test_a_published_example_runs_unchanged(name):
    score_mod, mask_mod = published(49, 4)[name]
    q, k, v = torch.randn(3, 2, 4, 49, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).unbind(0)
    block_mask = mask_mod and create_block_mask(mask_mod, 2, 4, 49, 49, device="cpu")
    theirs = flex_attention(q, k, v, score_mod=score_mod, block_mask=block_mask)
    spec = FlexAttention(score_mod, mask_mod).build(4)
    for backend in ("band", "reference"):
        torch.testing.assert_close(saccade.attention(q, k, v, spec, backend=backend), theirs, **EXACT)
    plain = saccade.attention(q, k, v)
    assert (name == "full") == torch.allclose(plain, theirs)


def test_flexattention_trains_on_the_cpu_where_the_original_refuses(qkv):
    q, k, v = (x.requires_grad_() for x in qkv)
    with pytest.raises(NotImplementedError):
        flex_attention(q, k, v, enable_gqa=True)
    spec = FlexAttention(lambda s, b, h, i, j: 2 * torch.tanh(s / 2) - 0.1 * (i - j).abs()).build(4)
    distance = (torch.arange(50)[:, None] - torch.arange(50)).abs()
    same_with_gradients(
        lambda q, k, v: saccade.attention(q, k, v, spec),
        lambda q, k, v: dense(q, k, v, lambda s: _softmax(2 * torch.tanh(s / 2) - 0.1 * distance, s)),
        qkv,
    )


def _softmax(changed, scores):
    return torch.softmax(changed.masked_fill(scores == -math.inf, -math.inf), -1)


def test_flexattention_promises_only_what_it_knows_of_a_function():
    assert FlexAttention().promised().causal
    promised = FlexAttention(mask_mod=lambda b, h, q, k: q >= k).promised()
    assert not (promised.causal or promised.decodes or promised.padding)
