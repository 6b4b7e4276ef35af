"""Systems that change the projections around softmax attention: their equations written out, and their counts."""

import math

import pytest
import torch
import torch.nn.functional as F

from saccade import SpecError
from saccade.nn import GPT, MultiHead
from saccade.nn.backbones import Place
from saccade.nn.init import initialise
from saccade.systems.score.diffqkv import DiffQKV
from saccade.systems.score.mhe import MHE
from saccade.systems.score.mqa import MQA
from saccade.systems.score.super_attention import SHARES, SuperAttention

torch.set_num_threads(1)
WIDTH, HEADS, D, N = 32, 4, 8, 19


def made(system, width=WIDTH, heads=HEADS):
    """The layer in float64 with weights so large that attention is far from uniform, and a stream."""
    layer = Place(width, heads, 0, 1, None, None).filled(system.layer)
    initialise(layer, "xavier", 3)
    with torch.no_grad():
        for p in layer.parameters():
            p.mul_(2)
    return layer.double(), torch.randn(2, N, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def read(q, k, v, causal=True):
    """Softmax attention written out: ``q [B, H, N, D]``, ``k`` and ``v [B, H, N, D]``."""
    s = torch.einsum("bhnd,bhmd->bhnm", q, k) / math.sqrt(q.shape[-1])
    if causal:
        s = s.masked_fill(torch.ones(s.shape[-2:]).triu(1).bool(), -math.inf)
    return torch.einsum("bhnm,bhmd->bhnd", s.softmax(-1), v)


def heads_of(weight, heads=HEADS):
    """``[heads * D, width]`` as ``[heads, width, D]``."""
    return weight.unflatten(0, (heads, -1)).mT


def count(layer):
    return sum(p.numel() for p in layer.parameters())


# ---- multi-query attention ----


@pytest.mark.parametrize("causal", [True, False])
def test_mqa_is_the_papers_einsums(causal):
    """The code of the paper (section 3), with its own letters; its P_q holds the scale."""
    layer, x = made(MQA(causal))
    p_q, p_o = heads_of(layer.q.weight), layer.out.weight.mT.unflatten(0, (HEADS, D))
    q = torch.einsum("bnd,hdk->bhnk", x, p_q / math.sqrt(D))
    k, v = (torch.einsum("bmd,dk->bmk", x, w.mT) for w in (layer.k.weight, layer.v.weight))
    logits = torch.einsum("bhnk,bmk->bhnm", q, k)
    if causal:
        logits = logits + torch.ones(N, N).triu(1) * -1e9
    o = torch.einsum("bhnm,bmv->bhnv", logits.softmax(-1), v)
    torch.testing.assert_close(layer(x), torch.einsum("bhnv,hvd->bnd", o, p_o))


def test_mqa_is_multi_head_attention_whose_heads_of_keys_are_copies():
    layer, x = made(MQA())
    plain = MultiHead(layer.spec, WIDTH, HEADS).double()
    with torch.no_grad():
        for name, repeats in {"q": 1, "k": HEADS, "v": HEADS, "out": 1}.items():
            getattr(plain, name).weight.copy_(getattr(layer, name).weight.repeat(repeats, 1))
    torch.testing.assert_close(layer(x), plain(x))
    assert count(plain) - count(layer) == 2 * (HEADS - 1) * WIDTH * D
    caches = [module.cache() for module in (layer, plain)]
    for module, cache in zip((layer, plain), caches, strict=True):
        module(x, cache=cache)
    assert caches[1].nbytes == HEADS * caches[0].nbytes


# ---- multi-head embeddings ----


@pytest.mark.parametrize("kind", ["mul", "add"])
def test_mhe_is_its_equation(kind):
    layer, x = made(MHE(kind, causal=False))
    read_by_head = []
    for h in range(HEADS):
        q, k, v = (
            shared(x) * (table.weight[h] + 1) if kind == "mul" else shared(x) + table.weight[h]
            for shared, table in zip((layer.q, layer.k, layer.v), layer.embeddings, strict=True)
        )
        read_by_head.append(((q @ k.mT) / math.sqrt(D)).softmax(-1) @ v)
    torch.testing.assert_close(layer(x), F.linear(torch.cat(read_by_head, -1), layer.out.weight))


def test_mhe_counts_as_the_paper_counts():
    """3 n d more than one head; multi-head attention (3 n² - 3 n) d² - 3 n d more than that (abstract)."""
    layer, _ = made(MHE())
    assert count(layer) == 3 * WIDTH * D + WIDTH * WIDTH + 3 * HEADS * D
    plain = MultiHead(layer.spec, WIDTH, HEADS)
    assert count(plain) - count(layer) == (3 * HEADS**2 - 3 * HEADS) * D**2 - 3 * HEADS * D


def test_mhe_of_zero_embeddings_is_one_head_said_often():
    layer, x = made(MHE())
    with torch.no_grad():
        for table in layer.embeddings:
            table.weight.zero_()
    one = read(*(p(x)[:, None] for p in (layer.q, layer.k, layer.v)))[:, 0]
    torch.testing.assert_close(layer(x), layer.out(one.repeat(1, 1, HEADS)))


def test_mhe_refuses_other_kinds():
    with pytest.raises(SpecError, match='"mul" or "add"'):
        MHE("power")


# ---- optimised, efficient, super ----


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", ["optimised", "efficient", "super"])
def test_super_attention_is_the_papers_slices(kind, causal):
    """Head by head, each on its own slice of the stream."""
    layer, x = made(SuperAttention(kind, length=24, causal=causal))
    keys = layer.k(x) if kind == "optimised" else x
    values = x
    if kind == "super":
        mixing = layer.mixing.weight[:N, :N]
        values = (mixing * torch.ones(N, N).tril() if causal else mixing) @ x
    slices = [slice(h * D, h * D + D) for h in range(HEADS)]
    q = layer.q(x)
    by_head = [read(*(a[:, None, :, s] for a in (q, keys, values)), causal)[:, 0] for s in slices]
    torch.testing.assert_close(layer(x), layer.out(torch.cat(by_head, -1)))


def test_super_attention_counts_as_the_paper_counts():
    plain = 4 * WIDTH * WIDTH
    for kind, share in SHARES.items():
        assert count(made(SuperAttention(kind))[0]) == share * plain
    assert count(made(SuperAttention("super", length=24))[0]) == plain / 2 + 24 * 24


def test_super_attention_that_mixes_nothing_is_efficient_attention():
    layer, x = made(SuperAttention("super", length=N))
    other, _ = made(SuperAttention("efficient"))
    with torch.no_grad():
        layer.mixing.weight.copy_(torch.eye(N))
    torch.testing.assert_close(layer(x), other(x))  # the same names, so the same first weights


def test_super_attention_mixes_no_padding_and_refuses_what_is_too_long():
    layer, x = made(SuperAttention("super", length=N, causal=False))
    keep = torch.arange(N) < torch.tensor([N, 7])[:, None]
    torch.testing.assert_close(layer(x, keep=keep)[1, :7], layer(x[1:, :7])[0])
    with pytest.raises(SpecError, match="length=20"):
        layer(torch.cat([x, x[:, :1]], 1))


# ---- DiffQKV ----


def group_sharing(heads, states):
    """Appendix E of the paper: every head of ``states`` repeated for its neighbours."""
    batch, count_, length, width = states.shape
    repeated = states[:, :, None].expand(batch, count_, heads // count_, length, width)
    return repeated.reshape(batch, heads, length, width)


@pytest.mark.parametrize("keys, values", [(8, 2), (2, 4), (1, 1)])
@pytest.mark.parametrize("fetch", [None, 5])
def test_diffqkv_is_the_papers_formula(keys, values, fetch):
    layer, x = made(DiffQKV(keys, values, fetch=fetch), heads=8)
    q = layer.q.down(F.silu(layer.q.gate(x)) * layer.q.up(x)).unflatten(-1, (8, 4)).transpose(1, 2)
    k = group_sharing(8, layer.k(x).unflatten(-1, (8 // keys, 4)).transpose(1, 2))
    v = group_sharing(8, layer.v(x).unflatten(-1, (8 // values, 4)).transpose(1, 2))
    s = (q @ k.mT / 2).masked_fill(torch.ones(N, N).triu(1).bool(), -math.inf)
    w = s.softmax(-1)
    if fetch:
        w = w * (w >= w.sort(-1, descending=True).values[..., fetch - 1 : fetch])
    expected = layer.out((w @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x), expected)
    cache = layer.cache()
    steps = [layer(token, cache=cache) for token in x.split(1, 1)]
    torch.testing.assert_close(torch.cat(steps, 1), expected)
    assert cache.nbytes == 8 * x[..., 0].numel() * 4 * (8 // keys + 8 // values)


def test_diffqkv_of_as_many_heads_is_multi_head_attention():
    layer, x = made(DiffQKV(1, 1, augment=0))
    plain = MultiHead(layer.spec, WIDTH, HEADS).double()
    plain.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(x), plain(x))


def test_diffqkv_counts_as_the_paper_counts():
    """The cache of Sigma's 32 heads falls by 37.5% (equation 2), and augmented Q costs what a wider SwiGLU costs."""
    layers = [Place(64, 32, 0, 1, None, None).filled(s.layer) for s in (DiffQKV(augment=0), DiffQKV(2, 2, augment=0))]
    kept = [layer.k.out_features + layer.v.out_features for layer in layers]
    assert kept[0] / kept[1] == 1 - 0.375
    wider = Place(64, 32, 0, 1, None, None).filled(DiffQKV().layer)
    assert count(wider) - count(layers[0]) == 3 * 64 * 96 - 64 * 64


def test_diffqkv_refuses_what_cannot_be_shared():
    with pytest.raises(SpecError, match="divide"):
        DiffQKV(3, 2)
    with pytest.raises(SpecError, match="at least 1"):
        DiffQKV(fetch=0)


# ---- all of them, in a model ----


@pytest.mark.parametrize("slug", ["mqa", "mhe", "super-attention", "diffqkv"])
def test_models_of_them_decode_what_they_prefill(slug):
    """With rotary positions, which the laws leave out."""
    torch.manual_seed(0)
    model = GPT(50, WIDTH, 2, HEADS, attention=slug).double()
    tokens = torch.randint(50, (1, N))
    caches = model.caches()
    with torch.no_grad():
        steps = torch.cat([model(part, caches) for part in tokens.split((12, 1, 6), 1)], 1)
        torch.testing.assert_close(steps, model(tokens))
