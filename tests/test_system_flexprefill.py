"""FlexPrefill against its definition written out with loops, one head at a time."""

import math

import pytest
import torch

from saccade import attention, masks
from saccade.core.attend import weights
from saccade.core.masks import Span
from saccade.systems.sparse._vertical_slash import by_distance, last_weights
from saccade.systems.sparse.flexprefill import Flex, FlexPrefill

torch.set_num_threads(1)


def draw(n, heads=2, kv=1, seed=0):
    """Tokens that come in runs, so that some blocks matter more than others; the second head likes its neighbors."""
    torch.manual_seed(seed)
    theme = torch.randn(1, kv, -(-n // 50), 8).repeat_interleave(50, 2)[:, :, :n]
    k = theme + 0.5 * torch.randn(1, kv, n, 8)
    q = torch.randn(1, heads, n, 8)
    q[:, 1] = 1.5 * k[:, 0] + 0.3 * q[:, 1]
    return 2 * q, k, torch.randn(1, kv, n, 8)


def chosen(select, q, k):
    n, m = q.shape[2], k.shape[2]
    codes = masks.Causal().blocks(Span.grid(n, m, select.rows, select.columns))[None, None]
    found = select.choose(q, k, codes)
    assert all(len(set(row)) == len(row) for row in [[b for b in r if b >= 0] for r in found.blocks[0, 0].tolist()])
    return found.dense(n, m)[..., :: select.rows, :: select.columns]


def cover(share, gamma):
    """How many of the largest it takes for their sum to exceed gamma."""
    total = 0.0
    for count, value in enumerate(sorted(share.tolist(), reverse=True), 1):
        total += value
        if total > gamma:
            return count
    return count + 1


def by_hand(q, k, gamma, tau, least, size):
    """``[N, D]`` each: the blocks of one head, and whether it is query-aware."""
    n, blocks = len(q), -(-len(q) // size)
    full = (q @ k.T / q.shape[1] ** 0.5).masked_fill(~torch.ones(n, n).tril().bool(), -math.inf).softmax(-1)
    a = full[-size:]
    column = a.sum(0) / size
    diagonal = torch.stack([a.diagonal(n - size - d).sum() / size for d in range(n)])  # by distance
    runs = [slice(i * size, min(n, (i + 1) * size)) for i in range(blocks)]
    vertical = torch.stack([column[r].sum() for r in runs])
    slash = torch.stack([diagonal.flip(0)[r].sum() for r in runs]).flip(0)
    mean_q, mean_k = (torch.stack([x[r].mean(0) for r in runs]) for x in (q, k))
    guess = (mean_k @ q[-size:].mean(0) / q.shape[1] ** 0.5).softmax(0)
    middle = (guess + vertical) / 2
    divergence = sum(float((p * (p / middle).log()).sum()) / 2 for p in (guess, vertical))
    aware = math.sqrt(divergence) < tau
    lowest = math.ceil(least / size)
    wanted = [lowest if aware else min(blocks, max(lowest, cover(x, gamma) // size + 1)) for x in (column, diagonal)]
    vertical[0] = slash[0] = math.inf
    best = [set(x.topk(count).indices.tolist()) for x, count in zip((vertical, slash), wanted, strict=True)]
    keep = torch.tensor([[j <= i and (j in best[0] or i - j in best[1]) for j in range(blocks)] for i in range(blocks)])
    if aware:
        score = mean_q @ mean_k.T / q.shape[1] ** 0.5
        score = score.masked_fill(~torch.ones(blocks, blocks).tril().bool(), -math.inf).softmax(-1)
        total = 0.0
        for place in score.flatten().argsort(descending=True).tolist():
            total += float(score.flatten()[place])
            if total > gamma * blocks:
                break
            keep[place // blocks, place % blocks] = True
    return keep & torch.ones(blocks, blocks).tril().bool(), aware


@pytest.mark.parametrize(("n", "gamma", "tau"), [(512, 0.5, 0.1), (500, 0.8, 0.3), (512, 0.6, 1.0), (390, 0.9, 0.0)])
def test_the_blocks_are_the_papers(n, gamma, tau):
    q, k, _ = draw(n)
    found = chosen(Flex(gamma, tau, 32, 32), q, k)
    for head in range(2):
        wanted, _ = by_hand(q[0, head], k[0, 0], gamma, tau, 32, 32)
        assert torch.equal(found[0, head], wanted)
        assert wanted.sum() < wanted.shape[0] * (wanted.shape[0] + 1) // 2


def test_both_kinds_of_head_occur():
    q, k, _ = draw(500)
    assert sorted(by_hand(q[0, h], k[0, 0], 0.8, 0.3, 32, 32)[1] for h in range(2)) == [False, True]


def test_sums_by_key_and_by_distance_are_those_of_the_dense_matrix():
    q, k, _ = draw(90)
    w = last_weights(q, k, 16)
    dense = weights(q, k, FlexPrefill().build(2))[:, :, -16:]
    torch.testing.assert_close(w, dense)
    wanted = torch.stack([dense.diagonal(90 - 16 - d, -2, -1).sum(-1) for d in range(90)], -1)
    torch.testing.assert_close(by_distance(w), wanted)


def test_more_gamma_is_nearer_to_dense_and_enough_is_dense():
    q, k, v = draw(512)
    dense = attention(q, k, v, FlexPrefill(gamma=2.0, block=32, tau=0).build(2))
    torch.testing.assert_close(dense, torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True))  # fmt: skip
    errors = [
        float((attention(q, k, v, FlexPrefill(g, 0.1, 32, 32).build(2)) - dense).abs().sum()) for g in (0.3, 0.7, 0.95)
    ]
    assert errors[0] > errors[1] > errors[2] > 0


def test_few_blocks_and_fewer_queries_than_keys_are_dense():
    q, k, _ = draw(512)
    assert chosen(Flex(0.1, 0.1, 32, 32), q[:, :, :64], k[:, :, :64]).equal(torch.ones(1, 2, 2, 2).tril().bool())
    assert chosen(Flex(0.1, 0.1, 32, 32), q[:, :, -1:], k).all()
