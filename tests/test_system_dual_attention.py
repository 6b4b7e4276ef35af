"""Dual attention: relational heads against their equation with the tensor of relations written out."""

import math

import pytest
import torch

from saccade import SpecError, masks
from saccade.nn import GPT, MultiHead, positions
from saccade.nn.attention import join
from saccade.nn.backbones import Place
from saccade.nn.init import initialise
from saccade.systems.score.dual_attention import DualAttention

torch.set_num_threads(1)
WIDTH, HEADS, D, N = 32, 4, 8, 19


def made(**settings):
    torch.manual_seed(0)
    layer = DualAttention(**settings).layer(Place(WIDTH, HEADS, 0, 1, None, None))
    initialise(layer, "xavier", 3)
    with torch.no_grad():
        for p in layer.parameters():
            p.mul_(1.5)
    return layer.double(), torch.randn(2, N, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def by_heads(x, weight, heads):
    return (x @ weight.mT).unflatten(-1, (heads, -1)).transpose(1, 2)


def chosen(layer, x, causal):
    """Attention weights ``[B, H, N, N]`` written out."""
    q, k = (by_heads(x, p.weight, layer.heads) for p in (layer.q, layer.k))
    s = q @ k.mT / math.sqrt(D)
    if causal:
        s = s.masked_fill(torch.ones(N, N).triu(1).bool(), -math.inf)
    return s.softmax(-1)


@pytest.mark.parametrize("relational", [1, 2, 3])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_it_is_the_papers_equations(relational, symmetric, causal):
    layer, x = made(relational=relational, symbols=7, symmetric=symmetric, causal=causal)
    of = layer.relational
    library = of.symbols
    symbols = []
    for h in range(HEADS):
        part = slice(h * D, h * D + D)
        asked = (x @ library.query.weight.mT + library.query.bias)[..., part]
        found = (asked @ library.templates[:, part].mT / math.sqrt(D)).softmax(-1)
        symbols.append(found @ library.library[:, part])
    symbols = torch.cat(symbols, -1)
    r = torch.einsum("blip,bljp->bijl", by_heads(x, of.related_q.weight, relational),
                     by_heads(x, of.related_k.weight, relational)) / math.sqrt(D)  # fmt: skip
    messages = torch.einsum("hdl,bijl->bhijd", of.related, r) + by_heads(symbols, of.v.weight, relational)[:, :, None]
    read = torch.einsum("bhij,bhijd->bhid", chosen(of, x, causal), messages)
    related = join(read) @ of.out.weight.mT
    sensory = layer.sensory
    fetched = join(chosen(sensory, x, causal) @ by_heads(x, sensory.v.weight, sensory.heads)) @ sensory.out.weight.mT
    torch.testing.assert_close(layer(x), torch.cat([fetched, related], -1))
    assert (of.related_q is of.related_k) == symmetric


def test_without_relations_a_relational_head_is_attention_to_symbols():
    layer, x = made(relational=2)
    of = layer.relational
    with torch.no_grad():
        of.related.zero_()
    plain = MultiHead(of.spec, WIDTH, 2, head_width=D).double()
    plain.out = of.out
    with torch.no_grad():
        for name in "qk":
            getattr(plain, name).weight.copy_(getattr(of, name).weight)
        plain.v.weight.copy_(of.v.weight)
    q, k, _ = plain.project(x, x)
    symbols = by_heads(of.symbols(x), of.v.weight, 2)
    torch.testing.assert_close(of(x), plain.merge(plain.attend(q, k, symbols), x))


def test_relations_are_bilinear():
    """Where every token is chosen alike, they are those with the mean of the relations' keys."""
    layer, x = made(relational=2, causal=False)
    of = layer.relational
    with torch.no_grad():
        of.v.weight.zero_()  # no symbols: relations alone
        of.q.weight.zero_()  # every token is chosen alike
        mean = of.related_k(x).mean(1, keepdim=True)
        q = of.related_q(x).unflatten(-1, (2, D))
        r = (q * mean.unflatten(-1, (2, D))).sum(-1) / math.sqrt(D)
        expected = torch.einsum("hdl,bnl->bnhd", of.related, r).flatten(2) @ of.out.weight.mT
    torch.testing.assert_close(of(x), expected)


def test_it_decodes_in_a_model_with_positions():
    model = GPT(11, WIDTH, 2, HEADS, attention=DualAttention(), positions=positions.RoPE())
    assert isinstance(model.stack.blocks[0].attention.relational.spec.mask, masks.Causal)
    tokens = torch.randint(11, (2, 12), generator=torch.Generator().manual_seed(0))
    caches = model.caches()
    steps = torch.cat([model(part, caches) for part in tokens.split((5, 1, 6), 1)], 1)
    torch.testing.assert_close(steps, model(tokens))
    assert caches[0].length == 12 and caches[0].nbytes > 0


def test_counts_and_what_it_refuses():
    layer, _ = made(relational=2, symbols=7)
    head = 2 * D
    sensory = 3 * WIDTH * head + head**2
    relational = sensory + 2 * WIDTH * head + 2 * D * 2 + WIDTH**2 + WIDTH + 2 * 7 * WIDTH
    assert sum(p.numel() for p in layer.parameters()) == sensory + relational
    for relational in (0, 4):
        with pytest.raises(SpecError, match=f"relational={relational}"):
            made(relational=relational)
