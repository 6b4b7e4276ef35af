"""Threads that share a call: the same results, on every path, and nothing left behind when something goes wrong."""

from __future__ import annotations

import multiprocessing
import threading

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import saccade
from saccade import Attention, edits, masks, normalizers, scores, selectors, stats
from saccade.core import band, crew


@pytest.fixture
def threads(monkeypatch):
    """Two threads for a call of any size; the numbers of the threads that worked."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    monkeypatch.setattr(crew, "WORTH", 0)
    worked: set[int] = set()
    until = crew.share

    def told(parts, work, count):
        def noted(part):
            worked.add(threading.get_ident())
            return work(part)

        return until(parts, noted, count)

    monkeypatch.setattr("saccade.core.band.share", told)
    yield worked
    torch.set_num_threads(before)


PROGRAMS = {
    "rows as they come": (Attention(mask=masks.Causal()), [stats.LogSumExp(), stats.TopK(3)]),
    "keys summed": (Attention(mask=masks.Causal(), edits=[edits.Scale(0.5, keys=slice(0, 9))]), [stats.KeyMass()]),
    "gathered": (Attention(mask=masks.Causal() & (masks.Window(40) | masks.Sinks(3))), [stats.KeyMass()]),
    "stairs": (Attention(mask=masks.Causal() & masks.Window(70)), [stats.BlockMax(32)]),
    "selected": (Attention(mask=masks.Causal(), select=selectors.TopKBlocks(3, block=32)), [stats.KeyMass()]),
    "heads mixed": (Attention(mask=masks.Causal(), edits=[edits.MixHeads(torch.eye(4) + 0.1)]), []),
    "learned": (Attention(score=[scores.ALiBi(torch.nn.Parameter(torch.rand(4)))], mask=masks.Causal()), []),
    "by autograd": (Attention(mask=masks.Causal(), normalizer=normalizers.Sparsemax()), [stats.Entropy()]),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_threads_give_what_the_definition_gives(threads, name):
    spec, watched = PROGRAMS[name]
    torch.manual_seed(0)
    given = [torch.randn(2, h, 601, 8, dtype=torch.float64) for h in (4, 2, 2)]
    found = {}
    for backend in ("band", "reference"):
        q, k, v = (x.clone().requires_grad_() for x in given)
        out = saccade.attention(q, k, v, spec.double(), stats=watched, backend=backend)
        out, seen = out if watched else (out, {})
        total = out.sin().sum() + sum(x.sin().sum() for x in seen.values() if isinstance(x, torch.Tensor))
        wanted = [q, k, v, *spec.parameters()]
        best = [x for value in seen.values() if isinstance(value, stats.Best) for x in value]
        found[backend] = [out, *torch.autograd.grad(total, wanted), *best]
    assert len(threads) == 2 or name == "rows as they come"  # there a quick thread may take everything
    for got, want in zip(found["band"], found["reference"], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("watched", [[], [stats.KeyMass()]])
def test_every_strip_is_worked_on_once(threads, monkeypatch, watched):
    q, places, real = torch.randn(1, 4, 1024, 8), [], band._scores

    def noted(program, strip, *rest):
        places.append((strip.g0, strip.g1, strip.r0))
        return real(program, strip, *rest)

    monkeypatch.setattr(band, "_scores", noted)
    saccade.attention(q, q, q, Attention(mask=masks.Causal()), stats=watched, backend="band")
    cells = sorted((g, r0) for g0, g1, r0 in places for g in range(g0, g1))
    assert cells == sorted({(g, r0) for g in range(4) for _, _, r0 in places})


def test_a_thread_has_its_own_cores_only_from_its_first_operation_on():
    """Torch sets a thread's number at its first operation, to that of the process unless somebody asked before."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        crew._pool.cache_clear()

        def used(_):
            torch.randn(1 << 20).exp_()
            return torch.get_num_threads()

        assert crew.share([[0], [1]], used, 2) == [1, 1]
    finally:
        torch.set_num_threads(before)


def test_an_error_in_a_thread_reaches_the_caller_and_ends_the_work(threads):
    q = torch.randn(1, 8, 2048, 8)
    calls = []

    def broken(score, b, h, q, k):
        calls.append(1)
        if len(calls) > 6:  # past the trial on the first tile
            raise ZeroDivisionError("mine")
        return score

    with pytest.raises(ZeroDivisionError, match="mine"):
        saccade.attention(q, q, q, Attention(score=[broken]), backend="band")
    assert len(calls) < 12  # of some 64 tiles


def test_modes_and_profilers_see_every_operation(threads):
    q = torch.randn(1, 4, 512, 8)
    with FlopCounterMode(display=False) as counted:
        saccade.attention(q, q, q, backend="band")
    assert counted.get_total_flops() == 2 * 2 * 4 * 512 * 512 * 8
    assert threads == {threading.get_ident()}


def test_inference_mode_and_the_number_of_threads_are_the_callers(threads):
    q = torch.randn(1, 4, 512, 8)
    with torch.inference_mode():
        assert saccade.attention(q, q, q, backend="band").is_inference()
    assert torch.get_num_threads() == 2
    taken = []
    other = threading.Thread(target=lambda: taken.append(torch.get_num_threads()))
    other.start()
    other.join()
    assert taken == [2]


def _attend(q):
    return float(saccade.attention(q, q, q, backend="band").sum())


def test_a_forked_process_makes_threads_of_its_own(threads):
    q = torch.randn(1, 4, 512, 8)
    want = _attend(q)
    context = multiprocessing.get_context("fork")
    sent = context.Queue()
    process = context.Process(target=lambda: sent.put(crew.share([[1], [2]], sum, 2)))
    process.start()
    assert sent.get(timeout=30) == [1, 2]
    process.join(30)
    assert _attend(q) == want
