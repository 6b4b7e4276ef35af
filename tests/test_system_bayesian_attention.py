"""Attention as a marginal: each case against probability theory from elsewhere, torch.distributions."""

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from saccade import SpecError, attention, weights
from saccade.study.laws import check
from saccade.systems.theory.bayesian_attention import BayesianAttention, posterior

CASES = ("soft", "hard", "positional", "slot")


@pytest.mark.parametrize("case", ["positional", "slot"])  # soft is plain attention; rounding turns hard choices around
def test_obeys_the_laws(case):
    assert not [r for r in check(BayesianAttention, {"case": case}) if r.status == "failed"]


def inputs(n=9, m=13):
    source = torch.Generator().manual_seed(0)
    return [torch.randn(2, 4, size, 8, generator=source, dtype=torch.float64) for size in (n, m, m)]


@pytest.mark.parametrize("case", CASES)
def test_programs_are_the_enumerated_posterior(case):
    q, k, _ = inputs()
    torch.testing.assert_close(weights(q, k, BayesianAttention(case, causal=False).build(4)), posterior(q, k, case))


def test_soft_attention_tells_which_gaussian_a_query_came_from():
    """Keys of one length are means of Gaussians of variance sqrt(D); the weights are the posterior component."""
    q, k, _ = inputs()
    k = F.normalize(k, dim=-1)
    found = weights(q, k, BayesianAttention(causal=False).build(4))
    parts = Independent(Normal(k[:, :, None], 8**0.25), 1)
    likelihood = parts.log_prob(q[:, :, :, None])
    mixture = MixtureSameFamily(Categorical(torch.ones(13, dtype=torch.float64)), Independent(
        Normal(k[0, 0], 8**0.25), 1))  # fmt: skip
    evidence = mixture.log_prob(q[0, 0]).exp()
    torch.testing.assert_close(found[0, 0], likelihood[0, 0].exp() / 13 / evidence[:, None])


def test_slots_are_a_step_of_expectation_maximization():
    q, k, v = inputs(3, 40)
    q = F.normalize(q, dim=-1)
    found = attention(q, k, v, BayesianAttention("slot").build(4))
    share = Normal(q[:, :, None], 8**0.25).log_prob(k[:, :, :, None]).sum(-1).softmax(-1)  # [B, H, keys, slots]
    means = torch.einsum("bhjs,bhjd->bhsd", share, v) / share.sum(2)[..., None]
    torch.testing.assert_close(found, means)


def test_a_prior_moves_attention():
    q, k, _ = inputs(13, 13)
    near = weights(q, k, BayesianAttention("positional", causal=False).build(4))
    soft = weights(q, k, BayesianAttention("soft", causal=False).build(4))
    away = (torch.arange(13)[:, None] - torch.arange(13)).abs()
    assert (near * away).sum(-1).mean() < (soft * away).sum(-1).mean()


def test_refuses_what_is_no_case():
    with pytest.raises(SpecError, match="slot"):
        BayesianAttention("iterative")
