"""Injected patterns: heads against dense masks written out, relevance by counting, tokens told by the model."""

import pytest
import torch

from saccade import attention, weights
from saccade.core.errors import SpecError
from saccade.nn import Encoder
from saccade.study.laws import check
from saccade.systems.explain._injected import Injected, follow
from saccade.systems.explain.pattern_injection import PatternInjection, discover, relevance

torch.set_num_threads(1)
TOKENS = torch.tensor([[5, 6, 9, 5, 7, 6, 9, 5, 3, 4], [1, 1, 2, 3, 4, 9, 5, 6, 7, 8]])


def test_check():
    for settings in ({}, {"patterns": ("-1", "+2"), "copies": 2, "causal": False}):
        assert not [result for result in check(PatternInjection, settings) if result.status == "failed"]


def dense(tokens, name, separators):
    """Bool ``[N, N]`` by loops."""
    n, ends = len(tokens), [0]
    for token in tokens.tolist():
        ends.append(ends[-1] + (token in separators))
    rule = {
        "same": lambda i, j: tokens[i] == tokens[j] and i != j,
        "segment": lambda i, j: ends[i] == ends[j],
    }.get(name, lambda i, j: j == i + int(name))
    return torch.tensor([[bool(rule(i, j)) for j in range(n)] for i in range(n)])


@pytest.mark.parametrize("causal", [True, False])
def test_heads_against_dense_masks(causal):
    torch.manual_seed(0)
    patterns = ("same", "segment", "+1", "-1")
    spec = PatternInjection(patterns, separators=(9,), causal=causal).build(5)
    spec.changes[0].tokens = TOKENS
    q, k, v = torch.randn(3, 2, 5, 10, 8).double()
    scores = q @ k.mT / 8**0.5
    visible = torch.ones(10, 10).tril().bool() if causal else torch.ones(10, 10).bool()
    wanted = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    for b in range(2):
        for h, name in enumerate(patterns):
            where = dense(TOKENS[b], name, (9,)) & visible
            masked = scores[b, h].masked_fill(~where, -torch.inf).softmax(-1)
            wanted[b, h] = torch.where(where.any(-1, keepdim=True), masked, wanted[b, h])
    assert torch.allclose(weights(q, k, spec), wanted)
    assert torch.allclose(attention(q, k, v, spec), wanted @ v)
    assert torch.allclose(attention(q, k, v, spec, backend="band"), wanted @ v)


def test_a_fixed_head_compares_nothing():
    """Not even a score that softmax would take for zero keeps it from its neighbour."""
    spec = PatternInjection(("-1",)).build(1)
    q = torch.randn(1, 1, 6, 4) * 300
    assert torch.equal(weights(q, q, spec)[0, 0, 1:, :-1].diagonal(), torch.ones(5))


def test_copies():
    spec = PatternInjection(("-1", "+1"), copies=2, causal=False).build(6)
    found = weights(torch.randn(1, 6, 7, 4), torch.randn(1, 6, 7, 4), spec)[0, :, 3]
    assert [bool(found[h, 2] == 1) for h in range(6)] == [True, False, True, False, False, False]
    assert [bool(found[h, 4] == 1) for h in range(6)] == [False, True, False, True, False, False]


def test_errors():
    with pytest.raises(SpecError, match="5 heads are asked for, of 4"):
        PatternInjection(("-1",), copies=5).build(4)
    with pytest.raises(SpecError, match="an offset"):
        Injected(["next"])
    spec = PatternInjection(("same",)).build(1)
    spec.changes[0].tokens = TOKENS
    with pytest.raises(SpecError, match="whole text"):
        weights(torch.randn(2, 1, 4, 8), torch.randn(2, 1, 4, 8), spec)


def test_relevance_by_counting():
    torch.manual_seed(1)
    tokens = TOKENS.clone()
    tokens[1, 7:] = 0
    seen = torch.randn(2, 3, 10, 10).masked_fill((tokens == 0)[:, None, None], -torch.inf).softmax(-1)
    for name in ("same", "segment", "-1", "+2"):
        shares = []
        for b, n in ((0, 10), (1, 7)):
            where = dense(tokens[b, :n], name, (9,))
            shares += [seen[b, :, i, :n][:, where[i]].sum(-1) for i in range(n) if where[i].any()]
        assert torch.allclose(relevance(seen, name, tokens, (9,)), torch.stack(shares).mean(0), atol=1e-6)


def test_injected_patterns_are_discovered():
    """A model follows its tokens, in a batch of other lengths too, and its heads show what was built in."""
    torch.manual_seed(0)
    system = PatternInjection(("-1", "same"), causal=False)
    model = follow(Encoder(12, 16, 2, 2, attention=system))
    padding = torch.cat([TOKENS, torch.zeros(2, 3, dtype=torch.int64)], 1)
    states = model(padding, padding != 0)
    assert torch.allclose(states[:, :10], model(TOKENS), atol=1e-5)
    found = discover(model, TOKENS)
    assert found["-1"] > 0.99 and found["same"] > 0.99 and found["+2"] < 0.5
    plain = discover(Encoder(12, 16, 2, 2), TOKENS)
    assert plain["-1"] < 0.3
