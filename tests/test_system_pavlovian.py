"""Conditioning by linear attention: the two rules written out, interference in closed form, errors over depth."""

import pytest
import torch
import torch.nn.functional as F

from saccade import SpecError, linear_attention
from saccade.nn.backbones import Place
from saccade.study.laws import check
from saccade.systems.theory.pavlovian import Pavlovian, capacity, chain, predicted, recall_error

PLACE = Place(8, 1, 0, 1, None, None)


@pytest.mark.parametrize("settings", [{}, {"trace": 0.9}, {"rule": "rescorla-wagner", "trace": 0.8}])
def test_obeys_the_laws(settings):
    assert not [r for r in check(Pavlovian, settings) if r.status == "failed"]


@pytest.mark.parametrize(("rule", "trace"), [("hebbian", 1.0), ("hebbian", 0.7), ("rescorla-wagner", 0.7)])
def test_associates_as_the_rule_says(rule, trace):
    q, k, v = torch.randn(3, 1, 1, 12, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = linear_attention(q, k, v, Pavlovian(rule, trace).layer(PLACE))[0, 0]
    memory = torch.zeros(8, 8, dtype=torch.float64)
    for t in range(12):
        cue, probe = (x[0, 0, t] / x[0, 0, t].norm() for x in (k, q))
        memory = trace * memory
        expected = memory.T @ cue if rule == "rescorla-wagner" else 0
        memory = memory + torch.outer(cue, v[0, 0, t] - expected)
        torch.testing.assert_close(found[t], memory.T @ probe, atol=1e-6, rtol=1e-6)  # the decay is kept in float32


def test_a_blocked_cue_learns_nothing():
    """Kamin: once one cue foretells the outcome, Rescorla and Wagner's rule adds nothing, Hebb's doubles it."""
    k = F.normalize(torch.ones(1, 1, 2, 4), dim=-1)
    v = torch.ones(1, 1, 2, 3)
    assert torch.allclose(linear_attention(k, k, v, Pavlovian("rescorla-wagner").layer(PLACE))[0, 0, 1], v[0, 0, 1])
    assert torch.allclose(linear_attention(k, k, v, Pavlovian().layer(PLACE))[0, 0, 1], 2 * v[0, 0, 1])


def test_interference_is_what_random_cues_overlap():
    assert recall_error(17, 32) == pytest.approx(16 / 32, rel=0.08)
    assert recall_error(1, 32) == pytest.approx(0, abs=1e-10)
    assert capacity(64) / capacity(16) == pytest.approx(4, rel=0.2)


def test_errors_add_up_over_depth_and_heads_divide_them():
    assert chain(3, 2, stream=4096) == pytest.approx(predicted(3, 2), rel=0.25)
    assert predicted(2, 4) == pytest.approx([1 / 16, (17 / 16) ** 2 - 1])


def test_refuses_what_is_no_rule():
    with pytest.raises(SpecError, match="rescorla"):
        Pavlovian("oja")
    with pytest.raises(SpecError, match="trace"):
        Pavlovian(trace=0)
