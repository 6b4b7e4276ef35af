"""Superlinear attention against its definition, written out query by query."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from saccade.core.attend import attention, explain
from saccade.core.masks import Padding
from saccade.systems.sparse.superlinear import Superlinear

SETTINGS = [(3, 3, 3, 1, 0.5), (2, 0, 2, 0, 0.5), (3, 1, 2, 1, 0.55)]


def draw(n: int, heads: int = 2) -> list[Tensor]:
    source = torch.Generator().manual_seed(n)
    return [torch.randn(1, heads, n, 8, generator=source, dtype=torch.float64) for _ in range(3)]


def defined(
    q: Tensor, k: Tensor, v: Tensor, spans: int, near: int, backward: float, forward: float, power: float
) -> Tensor:
    """One head ``[N, D]``: the official two functions and the gate, with loops."""
    window = math.floor((near + 1) ** (1 / power)) - 1
    out = torch.zeros_like(v)
    for p in range(len(q)):
        score = (k[: p + 1] @ q[p]) / math.sqrt(q.shape[-1])
        anchors, i = [], near + 1
        while (a := p - math.floor(i ** (1 / power)) + 1) >= 0:
            anchors.append(a)
            i += 1
        chosen = sorted(anchors, key=lambda a: -float(score[a]))[:spans]
        gates = torch.softmax(score[chosen], 0) if chosen else torch.ones(1, dtype=q.dtype)
        size = (p + 1) ** power
        for gate, a in zip(gates, chosen or [None], strict=True):
            keys = set(range(max(0, p - window + 1), p + 1))
            if a is not None:
                last = min(a + math.ceil(forward * size), p - window)
                keys |= set(range(max(0, a - math.ceil(backward * size)), last + 1))
            seen = sorted(keys)
            out[p] += gate * torch.softmax(score[seen], 0) @ v[seen]
    return out


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("backend", ["band", "reference"])
def test_definition(settings: tuple[int, int, float, float, float], backend: str) -> None:
    q, k, v = draw(170)
    out = attention(q, k, v, Superlinear(*settings).build(2), backend=backend)
    wanted = torch.stack([defined(q[0, h], k[0, h], v[0, h], *settings) for h in range(2)])
    torch.testing.assert_close(out[0], wanted, rtol=0, atol=1e-12)


def test_search_spares_keys_and_changes_nothing() -> None:
    q, k, v = draw(1200, heads=1)
    spec = Superlinear(2, 0, 2, 0).build(1)
    assert explain(spec, q, k).visited < 0.25  # half is causal
    out = attention(q, k, v, spec)
    spec.select = None
    torch.testing.assert_close(out, attention(q, k, v, spec), rtol=0, atol=1e-12)


def test_decoding_also_in_a_cache_with_room() -> None:
    q, k, v = draw(150)
    spec = Superlinear().build(2)
    whole = attention(q, k, v, spec)
    for at in (3, 20, 149):
        step = attention(q[:, :, at : at + 1], k[:, :, : at + 1], v[:, :, : at + 1], spec)
        roomy = attention(q[:, :, at : at + 1], k, v, spec, offset=at)
        for out in (step, roomy):
            torch.testing.assert_close(out[:, :, 0], whole[:, :, at], rtol=0, atol=1e-12)


def test_the_search_is_trained_by_the_gate() -> None:
    """A value that only one span holds moves the anchor's own score: the gradient reaches its key."""
    q, k, v = draw(100, heads=1)
    k.requires_grad_()
    weight = attention(q[:, :, -1:], k, v, Superlinear(2, 0, 2, 0).build(1)).sum()
    (grad,) = torch.autograd.grad(weight, k)
    assert (grad[0, 0].abs().sum(-1) > 0).sum() > 20


def test_hidden_keys_are_no_anchors() -> None:
    q, k, v = draw(128)
    keep = torch.ones(1, 128, dtype=torch.bool)
    keep[:, 32:64] = False
    spec = Superlinear(3, 1, 2, 1).build(2)
    spec.mask = spec.mask & Padding(keep)
    k[:, :, 32:64] = 100 * q[:, :, -1:]
    fast, slow = (attention(q, k, v, spec, backend=name) for name in ("band", "reference"))
    spec.select = None
    for out in (fast, slow):
        torch.testing.assert_close(out, attention(q, k, v, spec), rtol=0, atol=1e-12)


def test_reach() -> None:
    """Every key is in the window or in a span that could be chosen; spans of half the length leave holes."""
    for settings in SETTINGS:
        system = Superlinear(*settings)
        assert system.reachable(600)
        spans, window = system.build(1).normalizer, math.floor((settings[1] + 1) ** (1 / settings[4])) - 1
        for p in (0, 7, 100, 599):
            start, end = spans.bounds(torch.tensor(p), p - spans.stripes(p + 1, torch.device("cpu")))
            seen = set(range(max(0, p - window + 1), p + 1))
            seen |= {j for a, z in zip(start.tolist(), end.tolist(), strict=True) for j in range(a, z + 1)}
            assert seen == set(range(p + 1))
    assert not Superlinear(2, 0, 1, 0).reachable(600)
