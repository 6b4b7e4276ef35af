"""Sparse attention decomposition: scores of the model itself, orthonormal directions, counts by hand, cut edges."""

import math

import pytest
import torch

from saccade.hosts.handles import listen
from saccade.study.hosted_laws import small_model, some_tokens
from saccade.study.laws import check
from saccade.systems.explain._directions import firings, least, omega, read, terms_of
from saccade.systems.explain.sparse_attention_decomposition import Edge, SparseAttentionDecomposition, trace

torch.set_num_threads(1)


@torch.no_grad()
def test_terms_add_up_to_the_model_s_own_scores():
    model, tokens, calls = small_model(), some_tokens(), []
    for layer in model.model.layers:  # a norm that is not all ones
        layer.input_layernorm.weight.copy_(torch.rand(32, generator=torch.Generator().manual_seed(3)) + 0.5)
    with listen(model, calls.append):
        model(tokens, use_cache=False)
    inputs, added = read(model, tokens)
    i, j = torch.tensor([47, 20, 9]), torch.tensor([3, 20, 8])
    for call in calls:
        for head in range(4):
            x = inputs[call.site.layer].x[1]
            terms = terms_of(model, (call.site.layer, head), (x[i], x[j]), (i, j))
            u, s, v = omega(model, (call.site.layer, head), i, j)
            wanted = (call.q[1, head, i] * call.k[1, head // 2, j]).sum(-1)
            assert wanted.abs().max() > 0.1
            torch.testing.assert_close(terms.sum(-1), wanted, rtol=1e-4, atol=1e-4)
            eye = torch.eye(8).expand(3, 8, 8)
            torch.testing.assert_close(u.mT @ u, eye, rtol=0, atol=1e-5)
            torch.testing.assert_close(v.mT @ v, eye, rtol=0, atol=1e-5)
            assert (s.diff(dim=-1) <= 0).all()
    assert added[1].shape == (2, 48, 4, 32)


def test_the_least_terms():
    assert least(torch.tensor([1.0, 5.0, -2.0, 3.0]), 1.0) == [1, 3]  # 8 of 7
    assert least(torch.tensor([1.0, 5.0, -2.0, 3.0]), 0.7) == [1]  # 5 of 7 is 0.714
    assert least(torch.tensor([1.0, -5.0, 2.0]), 1.0) == [1]  # a score below zero: the lowest first
    assert least(torch.tensor([1.0, 2.0]), 1.0) == [1, 0]  # no sum is above all of it


@torch.no_grad()
def test_counts_of_firings_are_those_of_loops():
    model, tokens = small_model(), some_tokens(1, 12)
    found, plain = firings(model, tokens, most=1000)
    calls, wanted, own = [], [], []
    with torch.no_grad(), listen(model, calls.append):
        model(tokens, use_cache=False)
    inputs, _ = read(model, tokens)
    for call in calls:
        for head in range(4):
            score = call.q[0, head] @ call.k[0, head // 2].T
            weight = (score / math.sqrt(8)).masked_fill(torch.ones(12, 12).triu(1).bool(), -math.inf).softmax(-1)
            for i in range(12):
                for j in range(1, i + 1):
                    if weight[i, j] > 0.5 and score[i, j] > 0:
                        x, at = inputs[call.site.layer].x[0], (torch.tensor([i]), torch.tensor([j]))
                        u, s, v = omega(model, (call.site.layer, head), *at)
                        terms = [float(s[0, k] * (x[i] @ u[0, :, k]) * (x[j] @ v[0, :, k])) for k in range(8)]
                        for counts, each in (
                            (wanted, terms),
                            (own, (call.q[0, head, i] * call.k[0, head // 2, j]).tolist()),
                        ):
                            total, size = 0.0, 0
                            for term in sorted(each, reverse=True):
                                total, size = total + term, size + 1
                                if total > sum(each):
                                    break
                            counts.append(size)
    assert len(wanted) > 3 and sorted(found.tolist()) == sorted(wanted) and sorted(plain.tolist()) == sorted(own)


@torch.no_grad()
def test_a_cut_edge_takes_its_directions_out_of_one_head_at_one_place():
    model, tokens = small_model(), some_tokens(2, 20)
    directions = torch.linalg.qr(torch.randn(2, 32, 3, generator=torch.Generator().manual_seed(0)))[0]
    places, states = torch.tensor([4, 11]), []
    hook = model.model.layers[0].self_attn.register_forward_hook(lambda m, args, out: states.append(out[0]))
    added = read(model, tokens)[1][0]
    with SparseAttentionDecomposition([Edge((0, 2), places, directions)]).apply(model):
        model(tokens)
    hook.remove()
    wanted = states[0].clone()
    for b, place in enumerate(places.tolist()):
        for k in range(3):
            wanted[b, place] -= directions[b, :, k] * (directions[b, :, k] @ added[b, place, 2])
    assert (wanted - states[0]).abs().max() > 0.01
    torch.testing.assert_close(states[1], wanted, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_edge_is_the_head_and_side_that_writes_most_by_loops():
    model, tokens = small_model(), some_tokens(3, 16)
    inputs, added = read(model, tokens)
    query, key = torch.tensor([15, 14, 15]), torch.tensor([2, 9, 5])
    edges = set()
    for receiver in range(4):
        written = {}
        for b in range(3):
            i, j, x = int(query[b]), int(key[b]), inputs[1].x[b]
            u, s, v = (part[0] for part in omega(model, (1, receiver), query[[b]], key[[b]]))
            terms = torch.stack([s[k] * (x[i] @ u[:, k]) * (x[j] @ v[:, k]) for k in range(8)])
            for head in range(4):
                for side, at, basis in (("query", i, u), ("key", j, v)):
                    signal = sum((x[i] @ u[:, k]).sign() * s[k].sqrt() * basis[:, k] for k in least(terms))
                    out = float(added[0][b, at, head] @ signal / inputs[1].rms[b, at, 0])
                    written[head, side] = written.get((head, side), 0) + out
        head, side = max(written, key=written.get)
        assert trace(model, tokens, (1, receiver), query, key)[0] == (0, head, side)
        edges.add((head, side))
    assert len(edges) > 1


@torch.no_grad()
def test_a_planted_edge_is_found_and_carries_the_score():
    """Head (0, 1) alone writes what the keys of head (1, 3) read: the other heads of layer 0 add next to nothing."""
    model, tokens = small_model(), some_tokens(6, 20)
    w = model.model.layers[0].self_attn.o_proj.weight.unflatten(1, (4, 8))
    w[:, [0, 2, 3]] *= 0.01
    w[:, 1] *= 30
    query, key = torch.full((6,), 19), torch.arange(6) + 4
    edge, drops = trace(model, tokens, (1, 3), query, key)
    assert edge[:2] == (0, 1) and drops.shape[0] == 2
    assert drops.shape[1] > 1 and drops[0].mean() > 0.5 > drops[1].mean()


def test_biases_are_refused():
    model = small_model()
    model.model.layers[0].self_attn.k_proj.bias = torch.nn.Parameter(torch.zeros(16))
    with pytest.raises(Exception, match="biases"):
        omega(model, (0, 0), torch.tensor([1]), torch.tensor([0]))


def test_its_laws():
    assert not [r for r in check(SparseAttentionDecomposition) if r.status == "failed"]
