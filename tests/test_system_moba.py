"""MoBA against its definition written out query by query, in every executor, and its columns at the edges."""

import math

import pytest
import torch

import saccade
from saccade.core.errors import SpecError
from saccade.study import laws
from saccade.systems.sparse.moba import MoBA

torch.set_num_threads(1)


def draw(n, heads=4, kv=2, width=8, seed=0):
    source = torch.Generator().manual_seed(seed)
    shapes = ((1, heads, n, width), (1, kv, n, width), (1, kv, n, width))
    return [torch.randn(s, generator=source, dtype=torch.float64) for s in shapes]


def slow(q, k, v, block, keep):
    """One query at a time: sort the past blocks by the dot product with their mean, take the best and the own."""
    out = torch.zeros_like(q)
    for h in range(q.shape[1]):
        kv = h // (q.shape[1] // k.shape[1])
        for i in range(q.shape[2]):
            own = i // block
            likes = [(float(q[0, h, i] @ k[0, kv, j * block : (j + 1) * block].mean(0)), j) for j in range(own)]
            seen = [j for _, j in sorted(likes, reverse=True)[: keep - 1]] + [own]
            keys = [t for j in seen for t in range(j * block, (j + 1) * block) if t <= i]
            w = (k[0, kv, keys] @ q[0, h, i] / math.sqrt(q.shape[-1])).softmax(0)
            out[0, h, i] = w @ v[0, kv, keys]
    return out


@pytest.mark.parametrize("rows", [1, 16, 64])
@pytest.mark.parametrize("n, block, keep", [(70, 8, 3), (61, 16, 2), (40, 8, 1)])
@pytest.mark.parametrize("backend", ["band", "reference"])
def test_it_is_the_definition(n, block, keep, rows, backend):
    q, k, v = draw(n)
    out = saccade.attention(q, k, v, MoBA(block, keep, rows).build(4), backend=backend)
    torch.testing.assert_close(out, slow(q, k, v, block, keep), rtol=1e-12, atol=1e-12)


def test_with_every_block_kept_it_is_full_attention():
    q, k, v = (x.requires_grad_() for x in draw(70))
    full = saccade.Attention(mask=saccade.masks.Causal())
    for spec in (MoBA(8, 9, 16).build(4), MoBA(8, 99, 1).build(4), MoBA().build(4)):
        mine, theirs = (saccade.attention(q, k, v, s) for s in (spec, full))
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
        grads = [torch.autograd.grad(o.square().sum(), (q, k, v)) for o in (mine, theirs)]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_closed_keys_weigh_exactly_nothing():
    q, k, _ = draw(64, kv=4)
    w = saccade.weights(q, k, MoBA(8, 3, 32).build(4))
    assert (w.unflatten(-1, (8, 8)).sum(-1) > 0).sum(-1).amax() == 3
    assert ((w > 0).sum(-1) <= 3 * 8).all()
    # However great the scores of what is closed, they stay closed.
    far = saccade.weights(q.float(), 1e4 * k.float(), MoBA(8, 3, 32).build(4))
    assert not far[w == 0].any()


def test_two_calls_before_one_backward():
    """What a query chose travels with the call: a later call changes nothing in an earlier one's gradient."""
    spec = MoBA(8, 2, 16).build(4)
    one, other = ([x.requires_grad_() for x in draw(48, seed=s)] for s in (1, 2))
    alone = torch.autograd.grad(saccade.attention(*one, spec).square().sum(), one)
    first = saccade.attention(*one, spec)
    saccade.attention(*other, spec)
    for a, b in zip(torch.autograd.grad(first.square().sum(), one), alone, strict=True):
        assert torch.equal(a, b)


def test_inputs_are_left_as_they_are_even_by_an_explanation():
    q, k, v = draw(70)
    before = [x.clone() for x in (q, k, v)]
    spec = MoBA(8, 3, 16).build(4)
    saccade.explain(spec, q, k)
    saccade.attention(q, k, v, spec)
    saccade.explain(spec, q, k)
    assert all(torch.equal(a, b) for a, b in zip(before, (q, k, v), strict=True))


def test_a_cache_with_room_routes_as_one_without():
    q, k, v = draw(64, kv=4)
    spec = MoBA(8, 3, 16).build(4)
    roomy = [torch.cat([x, torch.full_like(x, math.nan)], 2) for x in (k, v)]
    out = saccade.attention(q[:, :, 37:], *roomy, spec, offset=37)
    torch.testing.assert_close(out, slow(q, k, v, 8, 3)[:, :, 37:], rtol=1e-12, atol=1e-12)


def test_laws_hold_in_small_blocks():
    """At the default, a law's short texts are one block."""
    for name in ("nothing flows from the future", "a padded batch equals each alone", "unread memory never shows"):
        laws.LAWS[name](laws.Case(MoBA, {"block": 8, "keep": 3, "rows": 16}))


def test_decoding_routes_as_prefill():
    q, k, v = draw(70)
    spec = MoBA(8, 3, 16).build(4)
    steps = [
        saccade.attention(q[:, :, i : i + 1], k[:, :, : i + 1], v[:, :, : i + 1], spec, offset=i) for i in range(70)
    ]
    torch.testing.assert_close(torch.cat(steps, 2), saccade.attention(q, k, v, spec), rtol=1e-12, atol=1e-12)


def test_refusals():
    with pytest.raises(SpecError, match="keep"):
        MoBA(keep=0).build(4)
    spec = MoBA(8).build(4)
    saccade.attention(*draw(20), spec)
    with pytest.raises(SpecError, match="another width"):
        saccade.attention(*draw(20, width=16), spec)
