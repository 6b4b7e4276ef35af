"""What the cache systems keep is what their papers' formulas, written out densely, say."""

import pytest
import torch
import torch.nn.functional as F

from saccade.cache import Cache
from saccade.core.errors import SpecError
from saccade.hosts.handles import listen
from saccade.study.hosted_laws import small_model, some_tokens
from saccade.systems.cache.a2sf import A2SF
from saccade.systems.cache.snapkv import SnapKV

LENGTH, BUDGET = 48, 14


@torch.no_grad()
def kept(system, chunks):
    """Positions held at the end by layer, and the dense weights ``[B, Hkv, N, N]`` of the uncompressed model."""
    model, tokens = small_model(), some_tokens(2, LENGTH)
    weights = {}

    def hear(call):
        k = call.k.repeat_interleave(2, 1)
        score = (call.q @ k.mT) * call.q.shape[-1] ** -0.5
        score = score.masked_fill(~torch.ones(LENGTH, LENGTH).tril().bool(), -torch.inf)
        weights[call.site.layer] = score.softmax(-1).unflatten(1, (2, 2)).sum(2)

    with listen(model, hear):
        model(tokens, use_cache=False)
    with Cache(model, system.policy(), budget=BUDGET) as cache:
        for piece in tokens.split(chunks, 1):
            model(piece, past_key_values=cache)
    return [layer.segments[0].positions for layer in cache.held], weights


@pytest.mark.parametrize("pooling", ["avg", "max"])
def test_snapkv_keeps_the_window_and_the_top_of_the_pooled_votes(pooling):
    window, kernel = 6, 3
    held, weights = kept(SnapKV(window, kernel, pooling), [LENGTH])
    for layer, positions in enumerate(held):
        votes = weights[layer][:, :, -window:, :-window].sum(2)
        pool = F.avg_pool1d if pooling == "avg" else F.max_pool1d
        top = pool(votes, kernel, stride=1, padding=kernel // 2).topk(BUDGET - window, -1).indices.sort(-1).values
        recent = torch.arange(LENGTH - window, LENGTH).expand(*top.shape[:2], -1)
        assert torch.equal(positions, torch.cat([top, recent], -1))


def test_snapkv_keeps_what_is_generated():
    held, _ = kept(SnapKV(6, 3), [LENGTH - 5, 1, 1, 1, 1, 1])
    assert all(p.shape[-1] == BUDGET + 5 for p in held)


@pytest.mark.parametrize("factor", [1.0, 0.8])
def test_a2sf_keeps_the_recent_and_the_top_of_the_faded_sum(factor):
    recent = 4
    held, weights = kept(A2SF(factor, recent), [LENGTH])
    fade = factor ** torch.arange(LENGTH - 1, -1, -1.0)
    score = (weights[0] * fade[:, None]).sum(2)[..., :-recent]
    top = score.topk(BUDGET - recent, -1).indices.sort(-1).values
    assert torch.equal(held[0][..., :-recent], top)
    assert torch.equal(held[0][..., -recent:], torch.arange(LENGTH - recent, LENGTH).expand(*top.shape[:2], -1))


@torch.no_grad()
def test_a2sf_fades_from_call_to_call():
    """Step by step, with room for all, the scores are those of the whole prompt at once."""
    model, tokens = small_model(), some_tokens(2, LENGTH)
    scores = []
    for chunks in ([LENGTH], [30, 10, *[1] * 8]):
        with Cache(model, A2SF(0.9, 4).policy(), budget=99) as cache:
            for piece in tokens.split(chunks, 1):
                model(piece, past_key_values=cache)
        scores.append(cache.held[1].segments[0].scores)
    assert torch.allclose(scores[0], scores[1], atol=1e-4)


@pytest.mark.parametrize("make", [lambda: SnapKV(0), lambda: SnapKV(4, 2), lambda: SnapKV(pooling="sum"),
                                  lambda: A2SF(0.0), lambda: A2SF(1.5), lambda: A2SF(recent=-1)])  # fmt: skip
def test_settings_outside_their_range_are_refused(make):
    with pytest.raises(SpecError, match="expected"):
        make()
