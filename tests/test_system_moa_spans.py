"""MoA against its layout written out, its influence against central differences, and its plan against enumeration."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from saccade import SpecError, attention, install
from saccade.systems.sparse._span_plan import knapsack, profile, search
from saccade.systems.sparse.moa_spans import Elastic, MoaSpans, cost, window
from saccade.worlds.text import Answer, Example
from test_masks import check_never_wrong, visible

torch.set_num_threads(1)
LAWS = settings(max_examples=25, deadline=None, derandomize=True)
SIZES = [st.integers(a, z) for a, z in ((1, 60), (0, 20), (1, 7), (1, 17), (1, 17))]


def layout(n, size, rules, length):
    """Band of blocks and the first block, one query and key at a time."""
    seen = torch.zeros(len(rules), n, n, dtype=torch.bool)
    for head, (alpha, beta) in enumerate(rules):
        count = max(1, int((alpha + beta * length) // size))
        for q in range(n):
            for k in range(q + 1):
                seen[head, q, k] = q // size - k // size < count or k // size == 0
    return seen


@pytest.mark.parametrize("length", [96, None])
def test_the_mask_is_the_layout(length):
    rules, n = [(0.0, 0.25), (-10.0, 0.5), (8.0, 0.0)], 50
    mask = MoaSpans(rules, 4, length).build(3).mask
    truth = layout(n, 4, rules, length or n)
    assert torch.equal(visible(mask, 1, 3, n, n)[0], truth)
    assert torch.equal(visible(mask, 1, 3, 5, n)[0], truth[:, -5:])
    assert [cost(rule, 96, 4) for rule in rules] == [7, 10, 3]
    assert cost((0.0, 1.0), 96, 4) == 24


@LAWS
@given(*SIZES, st.lists(st.tuples(st.integers(-20, 40), st.floats(0, 1)), min_size=2, max_size=2))
def test_blocks_are_never_wrong(n, more, size, rows, columns, rules):
    check_never_wrong(Elastic(size, rules, None), 1, 2, n, n + more, rows, columns)
    check_never_wrong(MoaSpans(rules, size, 40).build(2).mask, 1, 2, n, n + more, rows, columns)


def test_tiles_equal_dense_softmax_and_decoding_equals_prefill():
    rules = [(0.0, 0.25), (16.0, 0.0), (0.0, 1.0)]
    spec = MoaSpans(rules, 8, 600).build(6)
    q, k, v = torch.randn(3, 1, 6, 600, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind(0)
    i, j = torch.arange(600)[:, None], torch.arange(600)
    counts = torch.tensor([18, 2, 75])[:, None, None]
    seen = (((i // 8 - j // 8) < counts) | (j < 8)).repeat(2, 1, 1) & (j <= i)
    dense = (q @ k.mT / 4).masked_fill(~seen, -torch.inf).softmax(-1) @ v
    assert (attention(q, k, v, spec, backend="band") - dense).abs().max() < 1e-12
    step = attention(q[:, :, 500:501], k[:, :, :501], v[:, :, :501], spec, offset=500)
    assert (step - dense[:, :, 500:501]).abs().max() < 1e-12


def small():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=2, head_dim=8, **sizes)).double().eval()
    for p in model.parameters():
        if p.ndim > 1:
            p.data.mul_(5)
    return model


def test_influence_is_what_autograd_says_of_the_scores():
    """d loss / d score is A (g - sum A g); with that over 1 - A, key by key, from a model written out by hand."""
    model = small()
    page = Example(torch.randint(3, 60, (16,), generator=torch.Generator().manual_seed(0)), (Answer(10, 14, 1, 5),))
    found = profile(model, [page], 4)
    assert found.shape == (2, 4, 4, 4) and all(p.grad is None for p in model.parameters())

    def loss(change):
        """The loss with a little added to the score of one place, ``change`` by (layer, head, query, key)."""
        from saccade import Attention

        def program(layer, heads):
            at = change[0]
            touched = lambda score, b, h, q, k: torch.where(  # noqa: E731
                (h == at[1]) & (q == at[2]) & (k == at[3]), score + change[1], score
            )
            return Attention(score=touched if layer == at[0] else None)

        with torch.no_grad(), install(model, program):
            logits = model(page.tokens[None], use_cache=False).logits[0]
        return torch.nn.functional.cross_entropy(logits[9:13], page.tokens[10:14])

    weight = []
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weight = model(page.tokens[None], output_attentions=True, use_cache=False).attentions
    model.set_attn_implementation("sdpa")
    for layer, head, row, column in [(0, 1, 2, 0), (1, 3, 3, 1)]:
        total = 0.0
        for q, k in itertools.product(range(4 * row, 4 * row + 4), range(4 * column, 4 * column + 4)):
            slope = (loss(((layer, head, q, k), 3e-3)) - loss(((layer, head, q, k), -3e-3))) / 6e-3
            total += float((slope / (1 - weight[layer][0, head, q, k])).abs())
        assert total == pytest.approx(float(found[layer, head, row, column]), rel=1e-2)


def test_the_knapsack_is_exact():
    source = torch.Generator().manual_seed(0)
    for bounds in ((9, 14), (6, 20), (20, 8)):
        losses = torch.rand(4, 5, generator=source)
        costs = [(1, 1), (2, 5), (3, 2), (1, 4), (4, 6)]
        chosen = knapsack(losses, costs, bounds)
        allowed = [
            sum(float(losses[i, c]) for i, c in enumerate(pick))
            for pick in itertools.product(range(5), repeat=4)
            if all(sum(costs[c][d] for c in pick) <= bounds[d] for d in (0, 1))
        ]
        assert all(sum(costs[c][d] for c in chosen) <= bounds[d] for d in (0, 1))
        assert sum(float(losses[i, c]) for i, c in enumerate(chosen)) == pytest.approx(min(allowed))
    with pytest.raises(SpecError, match="raise the density"):
        knapsack(losses, costs, (3, 3))


def test_the_head_that_looks_far_gets_the_span():
    near = torch.eye(8).expand(1, 3, 8, 8).clone()
    near[0, 1, 7, 2] = 5.0  # head 1 alone looks five blocks back
    plan = search([near], [64], 128, 0.5, 8)
    spans = [window(rule, 64, 8) for rule in plan[0]]
    assert spans[1] >= 6 and sum(cost(rule, 64, 8) for rule in plan[0]) <= 12


@pytest.mark.parametrize("make", [lambda: MoaSpans([]).build(2), lambda: MoaSpans(block=0).build(2)])
def test_errors(make):
    with pytest.raises(SpecError, match="at least 1"):
        make()
