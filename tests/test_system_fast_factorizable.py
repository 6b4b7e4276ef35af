"""fast-factorizable: against the polynomial written out over all pairs, and the moments of the official code."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from saccade import SpecError, linear_attention, linear_weights
from saccade.systems.linear.fast_factorizable import Fast, Polynomial, dense, gap


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def polynomial(s, degree):
    return 1 + s if degree == 1 else 1 + s + s.square() / 2


CASES = [(degree, causal) for degree in (1, 2) for causal in (True, False)]


@pytest.mark.parametrize(("degree", "causal"), CASES)
def test_weights_are_the_polynomial_of_the_cosine(degree, causal):
    q, k = draw(2, 3, 40, 7), draw(2, 3, 40, 7, seed=1)
    s = torch.einsum("bhid,bhjd->bhij", q, k) / (q.norm(dim=-1)[..., None] * k.norm(dim=-1)[..., None, :])
    want = polynomial(s, degree)
    want = want.tril() if causal else want
    want = want / want.sum(-1, keepdim=True)
    assert_close(linear_weights(q, k, Fast(degree, causal).program()), want)
    assert float(want.min()) >= 0


@pytest.mark.parametrize(("degree", "causal"), CASES)
@pytest.mark.parametrize("form", ["parallel", "chunked", "recurrent"])
def test_output_is_the_moments_of_the_official_code(degree, causal, form):
    q, k, v = (draw(1, 2, 90, 5, seed=seed) for seed in range(3))
    a, b = (x / x.norm(dim=-1, keepdim=True) for x in (q, k))

    def summed(x):  # over all keys, or those so far
        return x.cumsum(2) if causal else x.sum(2, keepdim=True)

    top = summed(v) + torch.einsum("bhnd,bhndj->bhnj", a, summed(b[..., None] * v[..., None, :]).expand(1, 2, 90, 5, 5))
    below = summed(torch.ones_like(v[..., :1])) + (a * summed(b)).sum(-1, keepdim=True)
    if degree == 2:
        pairs = b[..., :, None] * b[..., None, :]
        third = summed(pairs[..., None] * v[..., None, None, :]).expand(1, 2, 90, 5, 5, 5)
        top = top + torch.einsum("bhnd,bhne,bhndej->bhnj", a, a, third) / 2
        below = below + torch.einsum("bhnd,bhne,bhnde->bhn", a, a, summed(pairs).expand(1, 2, 90, 5, 5))[..., None] / 2
    assert_close(linear_attention(q, k, v, Fast(degree, causal).program(), form=form), top / below)


@pytest.mark.parametrize(("degree", "causal"), CASES)
def test_the_claims_definition_is_the_polynomial_and_it_sees_a_difference(degree, causal, monkeypatch):
    q, k, v = (draw(1, 1, 20, 4, seed=seed) for seed in range(3))
    w = linear_weights(q, k, Fast(degree, causal).program())
    assert_close(dense(q, k, v, degree, causal), w @ v)
    assert gap(Fast(degree, causal), tokens=80) < 1e-5
    plain = Polynomial.forward
    monkeypatch.setattr(Polynomial, "forward", lambda self, x, heads: 1.01 * plain(self, x, heads)[..., :-1])
    assert gap(Fast(degree, causal), tokens=80) > 1e-3


@pytest.mark.parametrize(("degree", "count"), [(1, 7), (2, 28)])
def test_the_state_holds_each_moment_once(degree, count):
    q = draw(1, 2, 9, 6)
    _, state = linear_attention(q, q, q, Fast(degree).program(), return_state=True)
    assert state.S.shape == (1, 2, count, 6)


def test_length_of_vectors_does_not_matter():
    q, k, v = (draw(1, 2, 30, 6, seed=seed) for seed in range(3))
    spec = Fast().program()
    assert_close(linear_attention(5 * q, k * draw(1, 2, 30, 1, seed=4).exp(), v, spec), linear_attention(q, k, v, spec))


def test_other_degrees_are_refused():
    with pytest.raises(SpecError, match="degree 1 and 2; got 3"):
        Fast(3).program()


def test_without_order_keys_may_be_of_another_sequence():
    assert Fast(causal=False).promised().cross and not Fast().promised().cross
    q, k, v = draw(1, 2, 5, 6), draw(1, 2, 9, 6, seed=1), draw(1, 2, 9, 6, seed=2)
    s = F.cosine_similarity(q[..., :, None, :], k[..., None, :, :], dim=-1)
    w = polynomial(s, 2)
    assert_close(linear_attention(q, k, v, Fast(causal=False).program()), w @ v / w.sum(-1, keepdim=True))
