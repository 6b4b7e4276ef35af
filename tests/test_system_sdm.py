"""Sparse distributed memory: the intersection by enumeration, the read by real neurons, the official betas."""

from itertools import product

import pytest
import torch

from saccade import SpecError, attention, weights
from saccade.study.laws import check
from saccade.systems.theory._circles import fitted_beta, intersections, radius_of
from saccade.systems.theory.sdm import Sdm


def test_obeys_the_laws():
    assert not [r for r in check(Sdm) if r.status == "failed"]


def addresses(n):
    return torch.tensor(list(product((0, 1), repeat=n)))


def test_the_intersection_counts_the_neurons_in_reach_of_both():
    n = 9
    neurons = addresses(n)
    for radius in (1, 3, 4, 6):
        others = torch.arange(n) < torch.arange(n + 1)[:, None]  # by their distance from the first address
        near = (neurons.sum(1) <= radius) & ((neurons != others[:, None]).sum(-1) <= radius)
        counts = intersections(n, radius)
        assert counts + [0] * (n + 1 - len(counts)) == near.sum(1).tolist()


def test_reads_what_kanerva_s_neurons_hold():
    """Patterns written into all 2^n neurons and read back, against attention over signs."""
    n, radius = 10, 3
    source = torch.Generator().manual_seed(0)
    neurons = addresses(n).double()
    keys, queries = (torch.randint(0, 2, (m, n), generator=source).double() for m in (40, 25))
    values = torch.randn(40, 5, generator=source, dtype=torch.float64)
    reach = [(torch.cdist(neurons, x, p=0).round() <= radius).double() for x in (keys, queries)]  # [neurons, points]
    written, counted = reach[0] @ values, reach[0].sum(1)
    seen = reach[1].T @ counted
    expected = (reach[1].T @ written) / seen.clamp(min=1)[:, None]
    q, k = (2 * x[None, None] - 1 for x in (queries, keys))
    found = attention(q, k, values[None, None], Sdm(n, radius, causal=False).build(1).double())[0, 0]
    assert (seen > 0).sum() > 15 and (found[seen == 0] == 0).all()
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)  # the table is float32


@pytest.mark.parametrize(("radius", "official"), [(5, 35.48476174346817), (11, 15.852765236405924)])
def test_beta_is_the_official_one_without_its_bias(radius, official):
    beta, _ = fitted_beta(64, radius)
    assert beta * radius / (radius - 1) == pytest.approx(official, rel=1e-9)


def test_a_softmax_of_that_beta_is_near():
    x = torch.randn(2, 1, 2, 300, 64, generator=torch.Generator().manual_seed(1))
    q, k = x[0] + x[1], x[1]  # a noisy copy of each key
    memory = weights(q, k, Sdm(64, 15, causal=False).build(2))
    cosine = torch.nn.functional.normalize(q, dim=-1) @ torch.nn.functional.normalize(k, dim=-1).mT
    near = torch.softmax(fitted_beta(64, 15)[0] * cosine, -1)
    assert torch.corrcoef(torch.stack([memory.flatten(), near.flatten()]))[0, 1] > 0.95


def test_radius_holds_its_share():
    assert radius_of(64, 0.1) == 27 and radius_of(64, 4e-13) == 5  # the paper's d* for memory capacity


def test_refuses_a_circle_of_everything():
    with pytest.raises(SpecError, match="radius"):
        Sdm(8, 8)
