"""Landmark attention against its definition written out per query, and against closed forms."""

import math

import pytest
import torch

import saccade
from saccade.core.errors import SpecError
from saccade.study import laws
from saccade.systems.sparse.landmark import Landmark

torch.set_num_threads(1)
EXACT = {"rtol": 1e-11, "atol": 1e-11}


def draw(n, heads=4, kv=2, width=8, seed=0):
    source = torch.Generator().manual_seed(seed)
    shapes = ((1, heads, n, width), (1, kv, n, width), (1, kv, n, width))
    return [torch.randn(s, generator=source, dtype=torch.float64) for s in shapes]


def slow(q, k, block, keep=None):
    """Weights, one query at a time: own text and earlier landmarks share a softmax, a landmark's share goes inside."""
    size, n = block + 1, q.shape[2]
    w = torch.zeros(1, q.shape[1], n, n, dtype=q.dtype)
    for h in range(q.shape[1]):
        s = q[0, h] @ k[0, h // (q.shape[1] // k.shape[1])].T / math.sqrt(q.shape[-1])
        for i in range(n):
            own = i // size
            text = [j for j in range(own * size, i + 1) if j % size != block]
            earlier = sorted(range(own), key=lambda b: -float(s[i, b * size + block].detach()))[:keep]
            shares = torch.cat([s[i, text], s[i, [b * size + block for b in earlier]]]).softmax(0)
            w[0, h, i, text] = shares[: len(text)]
            for b, share in zip(earlier, shares[len(text) :], strict=True):
                inside = slice(b * size, b * size + block)
                w[0, h, i, inside] = share * s[i, inside].softmax(0)
    return w


@pytest.mark.parametrize("n, block, keep", [(40, 7, None), (41, 4, None), (40, 7, 2), (41, 4, 3), (38, 1, 4)])
@pytest.mark.parametrize("backend", ["band", "reference"])
def test_it_is_the_definition(n, block, keep, backend):
    q, k, v = draw(n)
    out = saccade.attention(q, k, v, Landmark(block, keep).build(4), backend=backend)
    torch.testing.assert_close(out, slow(q, k, block, keep) @ v.repeat_interleave(2, 1), **EXACT)


def test_the_gradient_is_that_of_the_definition():
    """In strips of a longer text too, and with every block retrieved."""
    q, k, v = (x.requires_grad_() for x in draw(60))
    theirs = torch.autograd.grad((slow(q, k, 5) @ v.repeat_interleave(2, 1)).square().sum(), (q, k, v))
    for spec in (Landmark(5).build(4), Landmark(5, 10).build(4)):
        mine = torch.autograd.grad(saccade.attention(q, k, v, spec, backend="band").square().sum(), (q, k, v))
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, **EXACT)


def test_all_blocks_retrieved_is_the_grouped_softmax_where_strips_are_many():
    q, k, v = draw(700, kv=4)
    whole, all_kept = (saccade.attention(q, k, v, Landmark(50, keep).build(4), backend="band") for keep in (None, 14))
    torch.testing.assert_close(all_kept, whole, **EXACT)


def test_equal_scores_give_the_closed_form():
    """Zero queries: t own tokens and b landmarks share alike, and a landmark's share is split over its text."""
    q, k, _ = draw(32)
    w = saccade.weights(torch.zeros_like(q), k, Landmark(7).build(4))[0, 0]
    share = 1 / (3 + 3)  # row 26: three tokens of its own block (24 to 26) and three landmarks
    expected = torch.tensor([*([share / 7] * 7 + [0.0]) * 3, *[share] * 3, *[0.0] * 5], dtype=w.dtype)
    torch.testing.assert_close(w[26], expected, **EXACT)
    assert w[31, 31] == 0 and w[31, 24:31].sum() > 0  # a landmark that asks reads its own block's text, not itself


def test_few_retrieved_are_those_of_the_greatest_landmarks():
    q, k, _ = draw(64, kv=4)
    w = saccade.weights(q, k, Landmark(7, 2).build(4))
    read = w.unflatten(-1, (8, 8)).sum(-1) > 0
    landmarks = (q @ k[:, :, 7::8].mT)[:, :, -1, :7]
    for head in range(4):
        assert set(read[0, head, -1, :7].nonzero()[:, 0].tolist()) == set(landmarks[0, head].topk(2).indices.tolist())
        assert read[0, head, -1, 7]


def test_decoding_retrieves_as_the_whole_does():
    q, k, v = draw(70)
    spec = Landmark(6, 2).build(4)
    steps = [
        saccade.attention(q[:, :, i : i + 1], k[:, :, : i + 1], v[:, :, : i + 1], spec, offset=i) for i in range(70)
    ]
    torch.testing.assert_close(torch.cat(steps, 2), saccade.attention(q, k, v, spec), **EXACT)


def test_laws_hold_with_retrieval():
    for name in ("a padded batch equals each alone", "unread memory never shows"):
        laws.LAWS[name](laws.Case(Landmark, {"block": 5, "keep": 2}))


def test_refusals():
    for settings in ({"block": 0}, {"keep": 0}):
        with pytest.raises(SpecError, match="at least 1"):
            Landmark(**settings).build(4)
    with pytest.raises(SpecError, match="holes"):
        holes = saccade.masks.Causal() & (saccade.masks.Window(64) | saccade.masks.Sinks(64))
        spec = saccade.Attention(mask=holes, normalizer=Landmark(6).build(4).normalizer)
        saccade.attention(*draw(1200, heads=2), spec, backend="band")
