"""SEA: its picture, mask and output against their definitions written out densely, and inside a model."""

import math

import pytest
import torch
import torch.nn.functional as F

from saccade import SpecError
from saccade.hosts.replaced import read
from saccade.study.hosted_laws import small_model, some_tokens
from saccade.study.laws import Work
from saccade.systems.sparse._picture_lessons import distill, loss
from saccade.systems.sparse.sea import Sea, attend

torch.set_num_threads(1)

HEADS, WIDTH, LENGTH, KEEP = 3, 8, 16, 4


def estimator(**settings):
    made = Sea(**({"keep": KEEP, "length": LENGTH, "context": 400, "narrow": 2} | settings)).make(HEADS, WIDTH).double()
    torch.nn.init.normal_(made.after.bias, generator=torch.Generator().manual_seed(2))  # at first, pixels are tied
    return made


def inputs(n, batch=2):
    return torch.randn(3, batch, HEADS, n, WIDTH, generator=torch.Generator().manual_seed(0)).double().unbind(0)


def pixels(i, length=LENGTH):
    """The pixel of each key that query i sees, in plain arithmetic."""
    return [max(0, math.floor((j + 0.5) / (i + 1) * length - 1e-4)) for j in range(i + 1)]


def seen(scores, keep=KEEP):
    """The mask of one text ``[H, N, N]`` from the picture's scores, in loops."""
    heads, n, length = scores.shape
    mask = torch.zeros(heads, n, n, dtype=torch.bool)
    for i in range(n):
        bright = {(h, p): float(scores[h, i].softmax(-1)[p]) for h in range(heads) for p in range(length)}
        count = max(1, round(heads * keep * length / (i + 1)))
        chosen = set(sorted(bright, key=bright.__getitem__, reverse=True)[:count])
        for h in range(heads):
            for j, p in enumerate(pixels(i)):
                mask[h, i, j] = (h, p) in chosen
    return mask


@pytest.mark.parametrize("n", [11, 45, 150])
def test_lists_the_keys_of_the_brightest_pixels(n):
    made = estimator()
    scores = torch.randn(1, HEADS, n, LENGTH, generator=torch.Generator().manual_seed(1))
    listed = made.keys(made.bright(scores))
    mask = seen(scores[0])
    for h in range(HEADS):
        for i in range(n):
            keys = [j for j in listed[0, h, i].tolist() if j >= 0]
            assert len(set(keys)) == len(keys)
            assert sorted(keys) == mask[h, i].nonzero()[:, 0].tolist()


def test_every_pixel_bright_is_every_key_seen():
    for length, n in ((16, 50), (4, 50), (64, 50)):
        keys = estimator(length=length).keys(torch.ones(1, HEADS, n, length, dtype=torch.bool))
        for i in range(n):
            assert sorted(j for j in keys[0, 0, i].tolist() if j >= 0) == list(range(i + 1))


@torch.no_grad()
def test_picture_is_the_network_written_out():
    n = 37
    made, (q, k, v) = estimator(), inputs(n)
    phi_q, phi_k = (((x * WIDTH**-0.25) @ made.projection.T).relu() + 0.001 for x in (q, k))
    weights = (phi_q @ phi_k.mT) * torch.ones(n, n).tril()
    weights = weights / (weights.sum(-1, keepdim=True) + 1e-6 * phi_q.sum(-1, keepdim=True))
    value = torch.cat([weights @ made.place[:n], weights @ v, v], -1)
    state = made.state(value)
    rows = made.row(state)
    x = torch.stack([rows[:, c // 2, :, c % 2 * 4 : c % 2 * 4 + 4] for c in range(2 * HEADS)], 1)
    x = made.before(x)
    for convolution in made.convolutions:  # as the official code: a tall kernel whose lower part is zero
        x = F.conv2d(x, F.pad(convolution.weight, (0, 0, 0, 2)), convolution.bias, padding=(4, 2), dilation=2).relu()
    x = torch.stack([x[..., p // 4] for p in range(LENGTH)], -1)
    x = torch.einsum("oc,bcnp->bonp", made.merge.weight[..., 0, 0], F.pad(x, (1, 1)))
    x = F.adaptive_avg_pool1d((x + made.merge.bias[:, None, None]).flatten(1, 2), LENGTH).view(2, HEADS, n, LENGTH)
    scores, shares = made(q, k, v)
    torch.testing.assert_close(scores, made.after(x))
    torch.testing.assert_close(shares, made.scales(state).sigmoid())


@torch.no_grad()
def test_output_is_the_shared_sparse_attention_and_the_mean():
    n = 40
    made, (q, k, v) = estimator(), inputs(n)
    out = attend(made, q, k, v, 0.7)
    scores, shares = made(0.7 * q, k, v)
    for b in range(2):
        mask = seen(scores[b])
        weights = (0.7 * q[b] @ k[b].mT).masked_fill(~mask, -torch.inf).softmax(-1).nan_to_num()
        mean = torch.stack([v[b, :, : i + 1].mean(1) for i in range(n)], 1)
        near, average = shares[b, ..., :1], shares[b, ..., 1:]
        torch.testing.assert_close(out[b], average * near * (weights @ v[b]) + (1 - average) * mean)


@torch.no_grad()
def test_no_later_token_is_read():
    made, (q, k, v) = estimator(), inputs(60)
    other = [x.clone() for x in (q, k, v)]
    for x in other:
        x[:, :, 40:] += 1
    one, two = attend(made, q, k, v), attend(made, *other)
    torch.testing.assert_close(one[:, :, :40], two[:, :, :40])
    assert not torch.allclose(one[:, :, 40:], two[:, :, 40:])


@torch.no_grad()
def test_map_is_a_causal_attention_matrix():
    made, (q, k, v) = estimator(), inputs(30)
    scores = made(q, k, v)[0]
    matrix = made.map(scores)
    torch.testing.assert_close(matrix.sum(-1), torch.ones(2, HEADS, 30).double())
    for i in (0, 7, 29):
        row = scores[0, 1, i][pixels(i)].softmax(-1)
        torch.testing.assert_close(matrix[0, 1, i, : i + 1], row)
        assert float(matrix[0, 1, i, i + 1 :].abs().sum()) == 0


@torch.no_grad()
def test_work_grows_with_the_length():
    counts = []
    for n in (512, 2048):
        made = Sea(16, 64, 2048, 2).make(HEADS, WIDTH)
        q, k, v = (x.float() for x in inputs(n, 1))
        with Work() as work:
            attend(made, q, k, v)
        counts.append(work.count)
    assert counts[1] < 5 * counts[0]


def test_distilling_lowers_the_loss_and_changes_the_model_only_inside():
    model, tokens = small_model(), some_tokens()
    system = Sea(4, 16, 64, 2)
    layer = read(model, tokens)[0]
    assert layer.k.shape[1] < layer.q.shape[1]
    first = loss(system.make(4, 8), layer).item()
    made = distill(system, model, [tokens] * 8, rate=1e-2)
    assert sorted(made) == [0, 1]
    assert loss(made[0], layer).item() < 0.9 * first
    with torch.no_grad():
        plain = model(tokens, use_cache=False).logits
        with system.apply(model, made):
            inside = model(tokens, use_cache=False).logits
        with system.apply(model):
            fresh = model(tokens, use_cache=False).logits
        after = model(tokens, use_cache=False).logits
    assert torch.equal(plain, after)
    assert float((inside - plain).norm()) < float((fresh - plain).norm())


def test_loss_is_that_of_matrix_and_output():
    made, (q, k, v) = estimator(), inputs(20)
    layer = read(small_model(), some_tokens())[0]._replace(q=q, k=k, v=v, scale=0.5)
    with torch.no_grad():
        matrix = made.map(made(0.5 * q, k, v)[0])
        truth = (0.5 * q @ k.mT).masked_fill(torch.ones(20, 20).triu(1).bool(), -torch.inf).softmax(-1)
        apart = torch.where(truth > 0, truth * (truth.log() - matrix.log()), 0).sum() / (2 * HEADS * 20)
        output = (attend(made, q, k, v, 0.5) - truth @ v).square().mean()
        wanted = 0.1 * apart + (matrix - truth).square().mean() + output
    torch.testing.assert_close(loss(made, layer), wanted)


def test_refuses_what_means_nothing():
    for settings in ({"length": 6}, {"keep": 0}, {"narrow": 100}):
        with pytest.raises(SpecError):
            estimator(**settings)
    with pytest.raises(SpecError, match="context of 400"):
        attend(estimator(), *inputs(401, 1))
