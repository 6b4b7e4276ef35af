"""SpargeAttn's two filters against the definition written out with loops; its rounding and its tuning."""

import math

import pytest
import torch
import torch.nn.functional as F

from saccade import attention, masks
from saccade.core.attend import weights
from saccade.core.masks import Span
from saccade.systems.sparse import _threshold_tuning
from saccade.systems.sparse._int8 import Int8
from saccade.systems.sparse._threshold_tuning import tune
from saccade.systems.sparse.spargeattn import MeanSim, SpargeAttn

torch.set_num_threads(1)


def draw(n, heads=2, kv=1):
    """Runs of tokens with a theme; some of them hold to it closely, others hardly."""
    torch.manual_seed(0)

    def themes(count, size):
        theme = torch.randn(1, count, -(-n // size), 16)
        noise = torch.randn(1, count, n, 16) * (torch.arange(n) // 130 % 3 / 1.2)[:, None]
        return 2 * theme.repeat_interleave(size, 2)[:, :, :n] + 1.5 * noise

    return themes(heads, 256), themes(kv, 64) + 4, torch.randn(1, kv, n, 16)  # what all keys share makes none alike


def by_hand(q, k, similarity, mass, causal, sink=False):
    """Bool ``[nq, nk]`` of one head, blocks of 128 and 64."""
    k = k - k.mean(0)
    rows, columns = ([x[s : s + size] for s in range(0, len(x), size)] for x, size in ((q, 128), (k, 64)))

    def alike(block):
        pairs = [float(F.cosine_similarity(a, block, -1).sum()) for a in block]
        return sum(pairs) / len(block) ** 2 > similarity

    keep = torch.zeros(len(rows), len(columns), dtype=torch.bool)
    like = [alike(c) for c in columns]
    for i, row in enumerate(rows):
        seen = [j for j in range(len(columns)) if not causal or 64 * j <= 128 * i + 127]
        means = {j: float(row.mean(0) @ columns[j].mean(0)) / q.shape[1] ** 0.5 for j in seen if like[j]}
        total = sum(math.exp(x) for x in means.values())
        chosen, run = [], 0.0
        for j in sorted(means, key=means.get, reverse=True):
            run += math.exp(means[j]) / total
            if chosen and run > mass:
                break
            chosen.append(j)
            if run > mass:
                break
        for j in seen if not alike(row) else {*chosen, *(j for j in seen if not like[j])} | ({0} if sink else set()):
            keep[i, j] = True
    return keep


@pytest.mark.parametrize(
    ("n", "similarity", "mass", "causal", "sink"),
    [(512, 0.6, 0.7, True, False), (500, 0.5, 0.9, True, True), (500, 0.5, 0.8, False, False)],
)
def test_the_blocks_are_the_papers(n, similarity, mass, causal, sink):
    q, k, _ = draw(n)
    mask = masks.Causal() if causal else masks.Full()
    codes = mask.blocks(Span.grid(n, n, 128, 64))[None, None]
    found = MeanSim(similarity, mass, sink).choose(q, k, codes).dense(n, n)[..., ::128, ::64]
    for head in range(2):
        assert torch.equal(found[0, head], by_hand(q[0, head], k[0, 0], similarity, mass, causal, sink))
    assert (codes > 0).sum() * 0.25 < found.sum() / 2 < (codes > 0).sum()


def test_heads_may_differ_and_a_lone_query_decodes():
    q, k, v = draw(512)
    apart = attention(q, k, v, SpargeAttn([0.6, 0.3], [0.9, 0.5]).build(2))
    for head, pair in enumerate([(0.6, 0.9), (0.3, 0.5)]):
        one = attention(q[:, head : head + 1], k, v, SpargeAttn(*pair).build(1))
        torch.testing.assert_close(apart[:, head : head + 1], one)
    torch.testing.assert_close(
        attention(q[:, :, -1:], k, v, SpargeAttn(mass=2.0).build(2)),
        F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[:, :, -1:],
    )


@pytest.mark.parametrize("n", [512, 470])
def test_the_second_filter_drops_tiles_that_hardly_count(n):
    q, k, v = draw(n)
    spec = SpargeAttn(0.5, 0.9, skip=4.0).build(2)
    w, before = weights(q, k, spec), weights(q, k, SpargeAttn(0.5, 0.9).build(2))
    wanted, dropped = before.clone(), 0
    for h in range(2):
        for r in range(0, n, 32):
            for c in range(0, n, 64):
                tile = before[0, h, r : r + 32, c : c + 64]
                if bool(((tile / before[0, h, r : r + 32].amax(-1, keepdim=True)).log2() <= -4).all()):
                    wanted[0, h, r : r + 32, c : c + 64] = 0
                    dropped += bool(tile.any())
    assert dropped > 5
    torch.testing.assert_close(w, wanted / wanted.sum(-1, keepdim=True))
    torch.testing.assert_close(attention(q, k, v, spec, backend="band"), w @ v)


def test_without_the_sink_a_row_may_see_nothing_and_gives_zeros():
    q, k, v = draw(512)
    assert not SpargeAttn(sink=False).promised().unit_rows
    out = attention(q, k, v, SpargeAttn(0.5, 0.9, sink=False).build(2))
    blind = (weights(q, k, SpargeAttn(0.5, 0.9, sink=False).build(2)).sum(-1) == 0)[..., None]
    assert blind.any() and not out.masked_select(blind).any()
    assert (weights(q, k, SpargeAttn(0.5, 0.9).build(2)).sum(-1) > 0.999).all()


def test_int8_rounds_by_blocks_and_keeps_the_output():
    q, k, v = draw(500)
    rough_q, rough_k = Int8(128, 64).prepare(q, k)
    centered = k - k.mean(-2, keepdim=True)
    for found, exact, size in ((rough_q, q, 128), (rough_k, centered, 64)):
        for a, b in zip(found.split(size, 2), exact.split(size, 2), strict=True):
            for head in range(a.shape[1]):
                step = b[:, head].abs().max() / 127
                steps = a[:, head] / step
                torch.testing.assert_close(steps, steps.round(), atol=1e-2, rtol=0)
                assert (a[:, head] - b[:, head]).abs().max() <= step * 0.51
    exact, rough = (attention(q, k, v, SpargeAttn(mass=2.0, int8=b).build(2)) for b in (False, True))
    assert 0 < (rough - exact).abs().sum() / exact.abs().sum() < 0.05


def test_tuning_stays_within_the_error_with_less_work():
    q, k, v = draw(1024)
    dense = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    found = {}
    for bound in (0.02, 0.2):
        spec = SpargeAttn(*tune(q, k, v, bound, steps=5)).build(2)
        off = (attention(q, k, v, spec) - dense).abs().sum((0, 2, 3)) / dense.abs().sum((0, 2, 3))
        assert (off <= bound).all()
        codes = masks.Causal().blocks(Span.grid(1024, 1024, 128, 64))[None, None]
        found[bound] = int((spec.select.choose(q, k, codes).blocks >= 0).sum())
    assert found[0.2] < found[0.02] <= 2 * int((codes > 0).sum())


def test_tuning_takes_for_each_head_the_similarity_of_least_work(monkeypatch):
    q, k, v = draw(1024)
    codes = masks.Causal().blocks(Span.grid(1024, 1024, 128, 64))[None, None]

    def work(similarities):
        monkeypatch.setattr(_threshold_tuning, "GRID", similarities)
        pair = tune(q, k, v, 0.1, steps=4)
        return (MeanSim(*pair, True).choose(q, k, codes).blocks >= 0).sum((0, 2, 3)), pair[0]

    each, (least, chosen) = torch.stack([work((s,))[0] for s in (0.2, 0.5, 0.9)]), work((0.2, 0.5, 0.9))
    assert torch.equal(least, each.amin(0)) and (each.amax(0) > least).all()
    assert chosen == [(0.2, 0.5, 0.9)[i] for i in each.argmin(0)]
