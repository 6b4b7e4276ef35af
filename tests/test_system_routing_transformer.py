"""Routing Transformer: clusters, members and moving averages against loops written from the paper and its code."""

import math

import pytest
import torch

from saccade import SpecError, attention
from saccade.systems.sparse._online_means import OnlineMeans
from saccade.systems.sparse.routing_transformer import Routing, RoutingTransformer

torch.set_num_threads(1)


def normalized(x):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def inputs(n=24):
    return torch.randn(2, 2, 4, n, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64).unbind(0)


def test_equals_its_definition():
    q, v = inputs()
    spec = RoutingTransformer(clusters=3, window=9).build(4)
    out = attention(q, torch.randn_like(q), v, spec)  # the keys given are not looked at
    x, means = normalized(q), spec.select.clusters.means.double()
    for b in range(2):
        for h in range(4):
            for i in range(24):
                if h < 2:
                    seen = list(range(max(0, i - 8), i + 1))
                else:
                    own = max(range(3), key=lambda c: x[b, h, i] @ means[h - 2, c])
                    ranked = sorted(range(24), key=lambda j: -(x[b, h, j] @ means[h - 2, own]))
                    seen = sorted({j for j in ranked[:9] if j <= i} | {i})
                weight = torch.stack([x[b, h, i] @ x[b, h, j] for j in seen]).softmax(0)
                torch.testing.assert_close(out[b, h, i], weight @ v[b, h, seen], rtol=1e-4, atol=1e-5)


def test_online_means_are_moving_averages():
    q, v = inputs()
    spec = RoutingTransformer(clusters=3, window=9, decay=0.9, online=True).build(4)
    with torch.no_grad():
        attention(q, q, v, spec)
    means = spec.select.clusters.means.double()
    sums, counts, x = means.clone(), torch.zeros(2, 3, dtype=torch.float64), normalized(q)[:, 2:]
    for _ in range(3):
        attention(q.requires_grad_(), q, v, spec)
        for h in range(2):
            nearest = (x[:, h] @ means[h].T).argmax(-1)
            for c in range(3):
                counts[h, c] = 0.9 * counts[h, c] + 0.1 * (nearest == c).sum()
                sums[h, c] = 0.9 * sums[h, c] + 0.1 * x[:, h][nearest == c].sum(0)
            smooth = (counts[h] + 1e-5) / (counts[h].sum() + 3e-5) * counts[h].sum()
            means[h] = sums[h] / smooth[:, None]
        torch.testing.assert_close(spec.select.clusters.means.double(), means, rtol=1e-4, atol=1e-4)


def test_kmeans_finds_clusters():
    """Vectors of two directions end up in two clusters, each with its own mean."""
    source = torch.Generator().manual_seed(1)
    centers = normalized(torch.randn(2, 8, generator=source))
    which = torch.randint(2, (1, 1, 64), generator=source)
    x = normalized(centers[which] + 0.2 * torch.randn(1, 1, 64, 8, generator=source))
    clusters = OnlineMeans(2, decay=0.5)
    for _ in range(30):
        clusters.move(x)
    cosine = torch.nn.functional.normalize(clusters.means[0], dim=-1) @ centers.T / math.sqrt(8)
    assert sorted(cosine.argmax(-1).tolist()) == [0, 1]
    assert cosine.amax(-1).min() > 0.95


def test_no_later_value_is_read():
    q, v = inputs()
    spec = RoutingTransformer(clusters=3, window=9).build(4)
    changed = v.clone()
    changed[:, :, 15:] += 1
    one, other = attention(q, q, v, spec), attention(q, q, changed, spec)
    assert torch.equal(one[:, :, :15], other[:, :, :15])


def test_means_stay_without_gradients_or_online():
    q, v = inputs()
    for online in (True, False):
        spec = RoutingTransformer(clusters=3, window=9, online=online).build(4)
        with torch.set_grad_enabled(not online):
            attention(q, q, v, spec)
            before = spec.select.clusters.means.clone()
            attention(q, q, v, spec)
        assert torch.equal(before, spec.select.clusters.means)


def test_refuses_no_clusters():
    with pytest.raises(SpecError, match="clusters"):
        Routing(1, 0, 4)
