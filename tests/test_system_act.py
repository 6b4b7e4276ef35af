"""ACT against the definition on dense weights, key by key."""

import math

import pytest
import torch

import saccade
from saccade import catalog
from saccade.core.errors import SpecError
from saccade.study import laws
from saccade.study.hosted_laws import small_model, some_tokens
from saccade.systems.llm.act import ACT, choose, find_sinks, prose, take
from saccade.worlds.text import heldout

torch.set_num_threads(1)


def dense(weights, beta=0.4, threshold=0.1):
    """One head's causal weights ``[N, N]`` after calibration, by loops over the definition."""
    n = len(weights)
    above = [j for j in range(n) if sum(float(weights[i, j]) for i in range(j, n)) / (n - j) > threshold]
    sinks, out = above[1:], weights.clone()
    for i in range(n):
        taken = sum(float(weights[i, j]) for j in sinks)
        left = sum(float(weights[i, j]) for j in range(n) if j not in sinks)
        for j in range(n):
            out[i, j] = beta * weights[i, j] if j in sinks else weights[i, j] * (1 + (1 - beta) * taken / left)
    return out, sinks


@torch.no_grad()
def heads_of(model, tokens, layer=0):
    """Queries, keys and values of a layer, as its attention is called with them."""
    from saccade.hosts.handles import listen

    calls = []
    with listen(model, calls.append, layers=layer):
        model(tokens, use_cache=False)
    return calls[0].q, calls[0].k, calls[0].v


def scored(q, k):
    s = q @ k.repeat_interleave(2, 1).mT / math.sqrt(q.shape[-1])
    return s.masked_fill(torch.ones(s.shape[-2:]).triu(1).bool(), -math.inf).softmax(-1)


@torch.no_grad()
def test_a_layer_gives_what_dense_calibrated_weights_give():
    model, tokens = small_model(), some_tokens(2, 30)
    q, k, v = heads_of(model, tokens)
    w = scored(q, k)
    chosen, moved = [(0, 1), (0, 2)], 0
    for b in range(2):
        for _, h in chosen:
            w[b, h], sinks = dense(w[b, h])
            moved += len(sinks)
    assert moved  # else there was nothing to calibrate
    torch.testing.assert_close(w.sum(-1), torch.ones(2, 4, 30))
    wanted = (w @ v.repeat_interleave(2, 1)).transpose(1, 2).flatten(2)
    seen = []
    hook = model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with ACT(chosen).apply(model):
        model(tokens)
    hook.remove()
    torch.testing.assert_close(seen[0], wanted, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_weights_are_those_of_the_definition():
    q, k, _ = heads_of(small_model(), some_tokens(1, 30))
    w = scored(q, k)
    mass, looked = w.sum(2), torch.arange(30, 0, -1)
    for beta, threshold in ((0.4, 0.1), (0.0, 0.2), (1.0, 0.1)):
        found = find_sinks(mass, looked, threshold)
        ours = saccade.weights(q, k, saccade.Attention(mask=saccade.masks.Causal(), edits=[take(found, beta)]))
        torch.testing.assert_close(ours.sum(-1), torch.ones(1, 4, 30))
        for h in range(4):
            wanted, sinks = dense(w[0, h], beta, threshold)
            assert found[0, h].nonzero()[:, 0].tolist() == sinks
            torch.testing.assert_close(ours[0, h], wanted, rtol=1e-4, atol=1e-5)


def test_the_first_sink_is_spared():
    mass, looked = torch.tensor([[[2.0, 0.2, 0.9, 1.0]]]), torch.tensor([4, 3, 2, 1])
    assert find_sinks(mass, looked, 0.1).tolist() == [[[False, False, True, True]]]
    assert find_sinks(mass, looked, 0.48).tolist() == [[[False, False, False, True]]]


@torch.no_grad()
def test_decoding_goes_on_with_the_mean_over_all_queries():
    """In the first layer, whose inputs ACT does not change, each step finds the sinks of the whole text so far."""
    model, tokens = small_model(), some_tokens(2, 30)
    heads = [(0, h) for h in range(4)]
    last = []
    hook = model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda m, a: last.append(a[0][:, -1]))
    with ACT(heads).apply(model):
        cache = model(tokens[:, :24]).past_key_values
        for t in range(24, 30):
            model(tokens[:, t : t + 1], past_key_values=cache)
        for t in range(24, 30):
            model(tokens[:, : t + 1], use_cache=False)
    hook.remove()
    torch.testing.assert_close(torch.stack(last[1:7]), torch.stack(last[7:]), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_left_padding_takes_no_part():
    model, tokens = small_model(), some_tokens(1, 24)
    mask = torch.ones(1, 30, dtype=torch.long)
    mask[0, :6] = 0
    padded = torch.cat([torch.zeros(1, 6, dtype=torch.long), tokens], 1)
    with ACT().apply(model):
        alone = model(tokens, use_cache=False).logits
        found = model(padded, attention_mask=mask, use_cache=False).logits[:, 6:]
    torch.testing.assert_close(found, alone, rtol=1e-3, atol=1e-3)


def test_gradients_flow():
    model, tokens = small_model(), some_tokens(1, 12)
    with ACT().apply(model):
        model(tokens, labels=tokens).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_choose_takes_the_heads_that_raise_accuracy():
    model, tokens = small_model(), some_tokens(1, 30)

    @torch.no_grad()
    def accuracy(m):
        return float(m(tokens, use_cache=False).logits[0, -1, 7])

    base, chosen = accuracy(model), choose(model, accuracy, layers=None)
    for layer in range(2):
        for head in range(4):
            with ACT([(layer, head)]).apply(model):
                assert (accuracy(model) > base) == ((layer, head) in chosen)
    assert 0 < len(chosen) < 8


def test_prose_is_followed_by_its_own_next_byte():
    prompts, following = prose(20, "x", 4)
    for prompt, byte in zip(prompts, following, strict=True):
        assert bytes([*prompt[1:].tolist(), int(byte)]) in heldout()


def test_wrong_settings_are_refused():
    with pytest.raises(SpecError, match="beta"):
        ACT(beta=1.5)
    with pytest.raises(SpecError, match="no layer"):
        ACT([(9, 0)]).apply(small_model())


def test_no_law_fails():
    results = laws.check(catalog.find("act"), {"threshold": 0.02})  # with 0.1 the laws' model has no sinks
    assert [r.status for r in results] == ["passed"] * len(results)
