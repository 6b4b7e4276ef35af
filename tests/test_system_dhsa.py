"""DHSA's labels, cuts, tokens and predictor against loops and formulas that spell them out."""

import math

import pytest
import torch
import torch.nn.functional as F

import saccade
from saccade import Attention, masks
from saccade.core.errors import SpecError
from saccade.core.selectors import TopKBlocks
from saccade.hosts.handles import listen
from saccade.study.probes import auroc, embedded
from saccade.systems.sparse._boundaries import Boundaries, Even, ratio, starts, teach
from saccade.systems.sparse.dhsa import DHSA, Chunks
from saccade.worlds.text import encode, heldout

torch.set_num_threads(1)


def draw(n=150, heads=4, kv=2, width=8, seed=0):
    source = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, h, n, width, generator=source, dtype=torch.float64) for h in (heads, kv, kv))
    k[:, :, 1:] += k[:, :, :-1].clone()
    return 2 * q, k, v


def dense(q, k):
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    score = q @ k.mT / math.sqrt(q.shape[-1])
    return score.masked_fill(torch.ones(score.shape[-2:], dtype=torch.bool).triu(1), -math.inf).softmax(-1)


def test_the_ratio_is_what_later_rows_pay_on_both_sides():
    w = dense(*draw(40)[:2]).mean(1)
    found = ratio(w)
    for c in range(40):
        if not 7 <= c < 32:
            assert not found[:, c].any()
            continue
        past, future = (w[:, c + 4 :, a : a + 4].sum((1, 2)) + 1e-6 for a in (c - 3, c + 1))
        torch.testing.assert_close(found[:, c], torch.maximum(past / future, future / past), rtol=1e-9, atol=0)


def test_cuts_are_the_greatest_and_keep_their_distance():
    score = torch.tensor([[0, 3.0, 0, 9.0, 0, 0, 0, 0, 0, 0, 0, 8.5, 0, 9.5, 1.0, 0, 0, 0, 0, 0, 0, 0, 2.0, 0, 7.0]])
    # 13 first, and 11 too near; 3 (ten away); 22 is nine from 13; 24, the last key, has nothing behind it.
    assert starts(score, 9)[0].nonzero()[:, 0].tolist() == [0, 4, 14, 23]
    assert starts(score, 2)[0].nonzero()[:, 0].tolist() == [0, 4, 14]
    assert starts(score * 0, 9)[0].nonzero()[:, 0].tolist() == [0]


def spelled(q, k, v, chunk_of, budget, rows, first, local, last):
    """Attention of one sample, row block by row block, from the chunk of every key."""
    h, n, width = q.shape
    keys = k.mean(0)
    chunks = torch.stack([keys[chunk_of == c].sum(0) / (chunk_of == c).sum().sqrt() for c in range(chunk_of.max() + 1)])
    out = torch.zeros(h, n, v.shape[-1], dtype=q.dtype)
    for start in range(0, n, rows):
        stop = min(start + rows, n)
        likes = chunks @ q[:, start:stop].mean((0, 1))
        near = list(range(max(0, stop - local), stop))
        rest = sorted(range(near[0]), key=lambda j: (-float(likes[chunk_of[j]]), j))[: budget - local]
        seen = sorted(near + rest)
        seen = sorted(set(seen[first:]) | set(range(min(first, stop))))
        if stop > n - last:
            seen = list(range(stop))
        for head in range(h):
            g = head // (h // len(k))
            for i in range(start, stop):
                at = [j for j in seen if j <= i]
                out[head, i] = (k[g, at] @ q[head, i] / math.sqrt(width)).softmax(0) @ v[g, at]
    return out


@pytest.mark.parametrize("budget, first, local, last", [(48, 8, 8, 0), (40, 0, 16, 30), (40, 20, 20, 0)])
def test_it_is_attention_to_the_tokens_of_the_best_chunks(budget, first, local, last):
    q, k, v = draw()
    rows = 16
    out = saccade.attention(q, k, v, DHSA(budget, rows, first, local, last).build(4))
    chunk_of = starts(ratio(dense(q, k).mean(1)), 150 // rows * 8).cumsum(-1) - 1
    assert (chunk_of.amax(-1) >= 8).all()
    for b in range(2):
        theirs = spelled(q[b], k[b], v[b], chunk_of[b], budget, rows, first, local, last)
        torch.testing.assert_close(out[b], theirs, rtol=1e-9, atol=1e-12)


def test_no_row_reads_more_than_the_budget_and_decoding_is_dense():
    q, k, v = draw(kv=4)
    spec = DHSA(48, 16, 8, 8, 0).build(4)
    seen = (saccade.weights(q, k, spec) > 0).sum(-1)
    assert seen.amax() == 48 and (seen[:, :, :16] == torch.arange(1, 17)).all()
    spec = DHSA(48, 16, 8, 8, 1).build(4)
    one = saccade.attention(q[:, :, -1:], k, v, spec)
    torch.testing.assert_close(one, dense(q, k)[:, :, -1:] @ v, rtol=1e-12, atol=1e-12)


def test_a_chunk_of_equal_keys_counts_by_the_root_of_its_length():
    """By means alone a short chunk would win, by sums a chunk four times as long would count four times as much."""

    class Cut(torch.nn.Module):
        def forward(self, k):
            logits = torch.zeros(len(k), k.shape[2])
            logits[:, [11, 47, 59]] = 5.0  # chunks of 12, 36, 12 and the rest
            return logits

    k = torch.zeros(1, 1, 128, 4)
    k[:, :, :12, 0], k[:, :, 12:48, 0], k[:, :, 48:60, 0] = 1.0, 0.5, 0.9
    q = torch.zeros(1, 1, 128, 4)
    q[..., 0] = 1.0
    scores = Chunks(Cut(), 32, 16, 0, 1, 0).scores(q, k)[0, 0]
    expected = torch.tensor([12**0.5, 0.5 * 36**0.5, 0.9 * 12**0.5, 0.0])
    torch.testing.assert_close(scores[[0, 12, 48, 60]], expected)


def test_the_predictor_sees_four_keys_on_either_side():
    torch.manual_seed(0)
    predictor, k = Boundaries(16, hidden=8), torch.randn(2, 2, 30, 8, requires_grad=True)
    logits = predictor(k)
    assert logits.shape == (2, 30)
    reached = torch.autograd.grad(logits[1, 13], k)[0].abs().sum((1, 3))
    assert reached[1].nonzero()[:, 0].tolist() == list(range(10, 18)) and not reached[0].any()
    # The keys of all heads side by side, mixed by attention of eight keys, then both halves compared.
    x = k[1, :, 10:18].transpose(0, 1).flatten(1)[None]
    mixed = F.layer_norm(predictor.mix(x, x, x)[0], [16], predictor.norm.weight, predictor.norm.bias)[0]
    a, b = mixed[:4].mean(0), mixed[4:].mean(0)
    told = torch.cat([a, b, (a - b).abs(), a * b, F.cosine_similarity(a, b, dim=0)[None]])
    torch.testing.assert_close(predictor.judge(told)[0], logits[1, 13])


def test_even_cuts_give_blocks():
    q, k, v = draw(128, heads=1, kv=1)
    blocks = Attention(mask=masks.Causal(), select=TopKBlocks(3, 16))
    even = DHSA(48, 16, 0, 16, 0).program(Even(16))
    ours, theirs = (saccade.attention(q, k, v, spec) for spec in (even, blocks))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_the_predictor_learns_the_labels_of_a_model():
    model, tokens = embedded(), encode(heldout()[:255]).unflatten(0, (2, 128))
    model.model.layers = model.model.layers[:2]
    predictor = teach(model, tokens, steps=25)
    keys, labels = [], []

    def hear(call):
        keys.append(call.k)
        labels.append(ratio(dense(call.q, call.k).mean(1)) >= 2)

    with torch.no_grad(), listen(model, hear):
        model(tokens[:1], use_cache=False)
    told = torch.cat([predictor(k)[0, 7:-8] for k in keys])
    assert auroc(told, torch.cat([cut[0, 7:-8] for cut in labels])) > 0.7
    assert not any(p.requires_grad for p in predictor.parameters())


def test_what_does_not_fit_is_refused():
    with pytest.raises(SpecError, match="budget=100 must hold first=64 and local=64"):
        DHSA(100, first=64, local=64).build(4)
    assert isinstance(DHSA(channels=16).build(2).select.predictor, Boundaries)
    assert isinstance(DHSA().build(2), Attention) and isinstance(DHSA().build(2).mask, masks.Causal)
