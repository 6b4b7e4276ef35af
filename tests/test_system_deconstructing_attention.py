"""Attention taken apart: each variant against its equation, and what each of them does not depend on."""

import math

import pytest
import torch
import torch.nn.functional as F

from saccade import SpecError, Unsupported
from saccade.nn import MultiHead
from saccade.nn.backbones import Place
from saccade.nn.init import initialise
from saccade.systems.theory._elsewhere import Deconstructed, Elsewhere
from saccade.systems.theory.deconstructing_attention import DeconstructingAttention, Gated

torch.set_num_threads(1)
WIDTH, HEADS, D, N, VOCAB = 24, 3, 8, 13, 17
TEXT = torch.arange(N + 3) % VOCAB


def layer_of(variant):
    layer = Place(WIDTH, HEADS, 0, 1, None, None).filled(DeconstructingAttention(variant).layer)
    initialise(layer, "xavier", 3)
    with torch.no_grad():
        for p in layer.parameters():
            p.mul_(2)
    return layer.double(), torch.randn(2, N, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def by_heads(x):
    return x.unflatten(-1, (HEADS, D)).transpose(1, 2)


def merged(layer, w, x):
    """Weights ``[B, H, N, N]`` on the layer's values."""
    return layer.out((w @ by_heads(layer.v(x))).transpose(1, 2).flatten(2))


def causal(s):
    return s.masked_fill(torch.ones(N, N).triu(1).bool(), -math.inf)


def model(variant, hybrid=False):
    torch.manual_seed(0)
    made = DeconstructingAttention(variant, hybrid).model(VOCAB, WIDTH, 3, HEADS, text=TEXT)
    with torch.no_grad():
        for p in made.parameters():
            p.mul_(6)  # far from uniform
    return made


def tokens(seed=0):
    return torch.randint(VOCAB, (2, N), generator=torch.Generator().manual_seed(seed))


def test_standard_is_softmax_attention():
    layer, x = layer_of("standard")
    s = by_heads(layer.q(x)) @ by_heads(layer.k(x)).mT / math.sqrt(D)
    torch.testing.assert_close(layer(x), merged(layer, causal(s).softmax(-1), x))


def test_approximate_is_the_taylor_expansion_of_its_exponential():
    layer, x = layer_of("approximate")
    s = by_heads(layer.q(x)) @ by_heads(layer.k(x)).mT / math.sqrt(D)
    w = (1 + s + s**2 / 2).tril()
    torch.testing.assert_close(layer(x), merged(layer, w / w.sum(-1, keepdim=True), x), rtol=1e-5, atol=1e-6)


def test_non_approximate_is_equation_18():
    """Each head: a running sum of exp(q[j] . k[j]) v[j], over one of exp(q[j] . k[j])."""
    layer, x = layer_of("non-approximate")
    loud = torch.exp((by_heads(F.silu(layer.q(x))) * by_heads(layer.k(x))).sum(-1, keepdim=True) / math.sqrt(D))
    read = (loud * by_heads(layer.v(x))).cumsum(2) / loud.cumsum(2)
    assert loud.std() > 0.1
    torch.testing.assert_close(layer(x), layer.out(read.transpose(1, 2).flatten(2)))


def test_mlp_is_its_equation_and_as_large_as_attention():
    layer, x = layer_of("mlp")
    assert isinstance(layer, Gated)
    torch.testing.assert_close(layer(x), (F.silu(x @ layer.gate.weight.mT) * (x @ layer.up.weight.mT))
                               @ layer.down.weight.mT)  # fmt: skip
    counts = [sum(p.numel() for p in layer_of(name)[0].parameters()) for name in ("mlp", "standard", "non-approximate")]
    assert counts == [4 * WIDTH**2] * 3


def weights_seen(made, given):
    """Queries and keys of every layer in one call with the batch of two."""
    seen = []
    layers = [block.attention for block in made.stack.blocks]

    def watched(layer):
        def attend(q, k, v, **options):
            if len(v) == 2:  # not the fixed sequence
                seen.append((q.detach(), k.detach()))
            return MultiHead.attend(layer, q, k, v, **options)

        layer.attend = attend

    for layer in layers:
        watched(layer)
    logits = made(given)
    return logits, seen


@pytest.mark.parametrize("variant", ["random-fixed", "text-fixed"])
def test_fixed_variants_look_the_same_way_at_every_text(variant):
    one, two = (weights_seen(model(variant), tokens(seed)) for seed in (0, 1))
    assert len(one[1]) == 3 and not torch.allclose(one[0], two[0])
    for (q, k), (other_q, other_k) in zip(one[1], two[1], strict=True):
        torch.testing.assert_close((q, k), (other_q, other_k))
        torch.testing.assert_close(q[0], q[1])


def test_text_fixed_is_standard_attention_on_that_very_text():
    made = model("text-fixed")
    plain = model("standard")
    plain.load_state_dict(made.state_dict())
    torch.testing.assert_close(made(TEXT[None, :N]), plain(TEXT[None, :N]))
    assert not torch.allclose(made(tokens()), plain(tokens()), atol=1e-2)


def test_static_queries_and_keys_are_of_embeddings_in_every_layer():
    made = model("static")
    _, seen = weights_seen(made, tokens())
    for block, (q, k) in zip(made.stack.blocks, seen, strict=True):
        given = block.before(made.embed(tokens()))
        expected = block.attention.positions(by_heads(block.attention.q(given)), by_heads(block.attention.k(given)), 0)
        torch.testing.assert_close((q, k), expected)
    plain = model("standard")
    plain.load_state_dict(made.state_dict())
    _, other = weights_seen(plain, tokens())
    torch.testing.assert_close(seen[0], other[0])  # in the first layer the states are the embeddings
    assert not torch.allclose(seen[1][0], other[1][0], atol=1e-2)


@pytest.mark.parametrize("variant", ["mlp", "approximate", "non-approximate", "random-fixed", "text-fixed", "static"])
def test_in_a_hybrid_every_second_layer_is_standard(variant):
    made = model(variant, hybrid=True)
    kinds = [type(block.attention) for block in made.stack.blocks]
    alone = type(model(variant).stack.blocks[0].attention)
    assert kinds == [alone, MultiHead, alone]
    changed = tokens()
    changed[:, -1] = (changed[:, -1] + 1) % VOCAB
    torch.testing.assert_close(made(changed)[:, :-1], made(tokens())[:, :-1])  # causal
    made(tokens()).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in made.parameters())


def test_without_mixing_a_token_knows_itself_alone():
    made = model("mlp")
    torch.testing.assert_close(made(tokens())[:, 4:5], made(tokens()[:, 4:5]))


@pytest.mark.parametrize("variant", ["mlp", "approximate", "non-approximate"])
def test_it_decodes(variant):
    made = model(variant, hybrid=True)
    caches = made.caches()
    steps = torch.cat([made(part, caches) for part in tokens().split((6, 1, 6), 1)], 1)
    torch.testing.assert_close(steps, made(tokens()), rtol=1e-4, atol=1e-4)


def test_what_is_refused():
    assert (
        DeconstructingAttention("mlp").promised().decodes and not DeconstructingAttention("static").promised().decodes
    )
    with pytest.raises(Unsupported, match="static has no cache"):
        model("static")(tokens(), model("static").caches())
    with pytest.raises(SpecError, match="16 tokens, these are 20"):
        model("text-fixed")(torch.zeros(1, 20, dtype=torch.long))
    with pytest.raises(SpecError, match="variant must be one of"):
        DeconstructingAttention("random")
    assert isinstance(model("static"), Deconstructed) and isinstance(layer_of("static")[0], Elsewhere)
