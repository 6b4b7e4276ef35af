"""Random frozen scores: the equation, ridge regression against torch's least squares, order that does not matter."""

import pytest
import torch
import torch.nn.functional as F

from saccade import attention
from saccade.study.laws import check
from saccade.systems.theory._ridge import least_risk
from saccade.systems.theory.random_feature_attention_theory import (
    HEADS,
    RandomFeatureAttentionTheory,
    features,
    sample,
)


def test_obeys_the_laws():
    assert not [r for r in check(RandomFeatureAttentionTheory, {"bias": 2.0, "causal": True}) if r.status == "failed"]


def test_is_the_equation():
    how = RandomFeatureAttentionTheory(bias=3.0, length=7)
    spec = how.build(4)
    q, k, v = (torch.randn(2, 4, n, d, generator=torch.Generator().manual_seed(n)) for n, d in ((5, 6), (7, 6), (7, 3)))
    w = spec.form.matrices(4, 6)
    assert w[:, :6, :6].diagonal(dim1=1, dim2=2).mean() == pytest.approx(3, abs=0.4) and w[:, 6, 6].abs().max() < 2
    q1, k1 = (F.pad(x, (0, 1), value=1.0) for x in (q, k))
    expected = torch.einsum("bhij,bhjd->bhid", torch.einsum("bhid,hde,bhje->bhij", q1, w, k1).relu() / 7, v)
    torch.testing.assert_close(attention(q, k, v, spec), expected, atol=1e-5, rtol=1e-5)
    assert not list(spec.parameters())


def test_features_do_not_care_for_the_order_of_keys():
    q, k, _ = sample(3, "average")
    x = features(q, k, RandomFeatureAttentionTheory())
    assert x.shape == (3, HEADS * 17)
    torch.testing.assert_close(x, features(q, k.flip(1), RandomFeatureAttentionTheory()))
    assert not torch.allclose(x, features(q, k, RandomFeatureAttentionTheory(seed=1)))


def test_risk_is_that_of_ridge_regression():
    source = torch.Generator().manual_seed(0)
    x, hidden = torch.randn(80, 5, generator=source), torch.randn(5, generator=source)
    y = x @ hidden + 3
    assert least_risk(x[:40], y[:40], x[40:], y[40:]) < 1e-8
    noise = torch.randn(80, generator=source)
    best = least_risk(x[:40], noise[:40], x[40:], noise[40:])
    padded = F.pad(x, (0, 1), value=1.0)
    plain = padded[40:] @ torch.linalg.lstsq(padded[:40], noise[:40, None]).solution[:, 0]
    assert best <= (plain - noise[40:]).square().mean() + 1e-6


def explained(seen, y):
    """Coefficients of least squares, which leaves nothing of y."""
    seen, y = F.pad(seen.double(), (0, 1), value=1.0), y.double()
    found = torch.linalg.lstsq(seen, y[:, None], driver="gelsd").solution[:, 0]
    assert (seen @ found - y).abs().max() < 1e-4
    return found[:-1]


def test_targets_are_what_they_say():
    """A direction of k, weighed by (q . k)²; and the square along a direction: one eigenvalue unlike all others."""
    q, k, y = sample(2000, "weighted")
    assert y.mean().abs() < 1e-5 and y.std() == pytest.approx(1, rel=1e-5)
    torch.testing.assert_close(torch.cat([q[:, None], k], 1).norm(dim=-1), torch.ones(2000, 17))
    explained(((k @ q[:, :, None]) ** 2 * k).mean(1), y)
    _, k, y = sample(2000, "average")
    form = explained(torch.einsum("ski,skj->sij", k, k).flatten(1), y).view(16, 16)
    eigenvalues = torch.linalg.eigvalsh(form)
    assert eigenvalues[-2] - eigenvalues[0] < 1e-3 * (eigenvalues[-1] - eigenvalues[-2])
