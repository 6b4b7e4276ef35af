"""Scatterbrain: against the weights it stands for, written out densely, and inside a model."""

import math

import pytest
import torch

from saccade import SpecError
from saccade.study.hosted_laws import small_model, some_tokens
from saccade.study.laws import Work
from saccade.systems.sparse._features import orthogonal
from saccade.systems.sparse.scatterbrain import Scatterbrain

torch.set_num_threads(1)

WIDTH = 6


def inputs(n, m=None, heads=2, scale=1.0):
    source = torch.Generator().manual_seed(0)
    shapes = ((n, WIDTH), (m or n, WIDTH), (m or n, 5))
    q, k, v = (torch.randn(1, heads, *shape, generator=source, dtype=torch.float64) for shape in shapes)
    return scale * q, scale * k, v


def estimate(features, q, k, scale):
    """``phi(q) . phi(k)`` of one head, unscaled: the mean of cosh's two exponentials."""

    def phi(x):
        x = x * math.sqrt(scale)
        turned = x @ features.double().T
        both = torch.cat([turned, -turned], -1) - x.square().sum(-1, keepdim=True) / 2
        return both.exp() / math.sqrt(both.shape[-1])

    return phi(q) @ phi(k).T


def shared(scatter, q, k):
    """Which pairs share a cluster in some round ``[N, M]`` of one head, in loops."""
    n, m = len(q), len(k)
    count = math.ceil(m / scatter.cluster)
    rows = math.ceil(n / count)
    longest = max(x @ x for x in q) + max(x @ x for x in k)
    hit = torch.zeros(n, m, dtype=torch.bool)
    for way in scatter.directions.double().T:
        by_q = [float(torch.cat([x, x.new_zeros(1), (longest - x @ x).sqrt()[None]]) @ way) for x in q]
        by_k = [float(torch.cat([x, (longest - x @ x).sqrt()[None], x.new_zeros(1)]) @ way) for x in k]
        order, key_order = (sorted(range(len(by)), key=by.__getitem__) for by in (by_q, by_k))
        for c in range(count):
            for i in order[c * rows : (c + 1) * rows]:
                for j in key_order[c * scatter.cluster : (c + 1) * scatter.cluster]:
                    hit[i, j] = True
    return hit


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("n", "m", "settings"), [
    (32, 32, {}), (29, 29, {}), (40, 19, {}), (29, 29, {"rounds": 3}), (29, 29, {"features": 0}),
    (29, 29, {"cluster": 0}), (29, 29, {"local": 6}), (29, 29, {"local": 7, "features": 0}), (300, 300, {}),
])  # fmt: skip
def test_equals_the_weights_it_stands_for(n, m, settings, causal):
    if causal and n != m:
        pytest.skip("causal needs as many queries as keys")
    q, k, v = inputs(n, m)
    scatter = Scatterbrain(**({"cluster": 8, "features": 10} | settings)).make(WIDTH)
    out = scatter(q, k, v, 0.3, causal)
    away = torch.arange(m) - torch.arange(n)[:, None]
    for h in range(2):
        if scatter.local:
            hit = (away >= -(scatter.local // 2)) & (away < (scatter.local + 1) // 2)
        else:
            hit = shared(scatter, q[0, h], k[0, h]) if scatter.cluster else torch.zeros(n, m, dtype=torch.bool)
        low = estimate(scatter.features, q[0, h], k[0, h], 0.3) if len(scatter.features) else torch.zeros(n, m).double()
        weights = torch.where(hit, (0.3 * q[0, h] @ k[0, h].T).exp(), low)
        weights = weights.masked_fill(away > 0, 0) if causal else weights
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-300)
        torch.testing.assert_close(out[0, h], weights @ v[0, h])


def test_one_cluster_is_exact_attention():
    q, k, v = inputs(24, scale=2.0)
    for causal in (False, True):
        score = q @ k.mT / math.sqrt(WIDTH)
        score = score.masked_fill(torch.ones(24, 24).triu(1).bool(), -math.inf) if causal else score
        out = Scatterbrain(24, features=8).make(WIDTH)(q, k, v, causal=causal)
        torch.testing.assert_close(out, score.softmax(-1) @ v)


def test_sharp_scores_do_not_overflow():
    q, k, v = (x.float() for x in inputs(24, scale=20.0))  # exponents of some thousands
    for settings in ({}, {"features": 0}, {"cluster": 0}):
        for causal in (False, True):
            out = Scatterbrain(**({"cluster": 4, "features": 8} | settings)).make(WIDTH)(q, k, v, causal=causal)
            assert bool(out.isfinite().all())


def test_features_are_unbiased_and_orthogonal():
    q, k, _ = inputs(8)
    source = torch.Generator().manual_seed(0)
    found = [estimate(orthogonal(WIDTH, WIDTH, source), q[0, 0], k[0, 0], 0.3) for _ in range(4000)]
    mean, error = torch.stack(found).mean(0), torch.stack(found).std(0) / math.sqrt(4000)
    assert bool(((mean - (0.3 * q[0, 0] @ k[0, 0].T).exp()).abs() < 5 * error).all())
    once = orthogonal(2 * WIDTH, WIDTH, source)
    gram = once @ once.T
    off = gram[:WIDTH, :WIDTH] - gram[:WIDTH, :WIDTH].diagonal().diag()
    assert float(off.abs().max()) < 1e-5 < float(gram[:WIDTH, WIDTH:].abs().max())


def test_no_later_value_is_read():
    q, k, v = inputs(64)
    changed = v.clone()
    changed[:, :, 40:] += 1
    one, other = (Scatterbrain(8, features=8).make(WIDTH)(q, k, x, causal=True) for x in (v, changed))
    torch.testing.assert_close(one[:, :, :40], other[:, :, :40])
    assert not torch.allclose(one[:, :, 40:], other[:, :, 40:])


def test_gradients_are_those_of_the_weights():
    q, k, v = (x.requires_grad_() for x in inputs(8, heads=1))
    scatter = Scatterbrain(4, features=4).make(WIDTH)
    assert torch.autograd.gradcheck(lambda *x: scatter(*x, causal=True), (q, k, v), fast_mode=True)


def test_work_grows_with_the_length_and_grouped_keys_are_shared():
    counts = []
    for n in (512, 2048):
        q, k, v = inputs(n)
        with torch.no_grad(), Work() as work:
            Scatterbrain().make(WIDTH)(q, k, v, causal=True)
        counts.append(work.count)
    assert counts[1] < 4.4 * counts[0]
    scatter = Scatterbrain(8, features=8).make(WIDTH)
    q, k, v = inputs(32)
    one = scatter(q, k[:, :1], v[:, :1])
    torch.testing.assert_close(one, scatter(q, k[:, :1].expand_as(k), v[:, :1].expand_as(v)))


def test_in_a_model_everything_in_one_cluster_changes_nothing_and_few_do():
    model, tokens = small_model(), some_tokens()
    with torch.no_grad():
        plain = model(tokens, use_cache=False).logits
        with Scatterbrain(64).apply(model):
            whole = model(tokens, use_cache=False).logits
        with Scatterbrain(8).apply(model):
            few = model(tokens, use_cache=False).logits
    torch.testing.assert_close(whole, plain, rtol=1e-3, atol=1e-3)
    assert float((few - plain).abs().max()) > 0.1


@pytest.mark.parametrize("settings", [{"features": 3}, {"cluster": -1}, {"rounds": 0}, {"cluster": 0, "features": 0}])
def test_refuses_what_means_nothing(settings):
    with pytest.raises(SpecError):
        Scatterbrain(**settings).make(WIDTH)
