"""Token-level masking against the official loop, written out, and the layers that its claim compares with."""

import math

import pytest
import torch

from saccade import SpecError
from saccade.nn import MultiHead
from saccade.nn.backbones import Place
from saccade.nn.init import initialise
from saccade.systems.score import _regularized as regularized
from saccade.systems.score.tlm import TLM, Masked
from saccade.worlds.grammar import grammar

torch.set_num_threads(1)
WIDTH, HEADS, N, RATE = 16, 2, 13, 0.4


def made(kind, rate=RATE, **options):
    layer = kind(Place(WIDTH, HEADS, 0, 1, None, None), rate, **options)
    initialise(layer, "xavier", 3)
    return layer.double(), torch.randn(2, N, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def official(stays, alone, keep, causal):
    """BertEncoder._d_expand_mask with "both": row by row, what each token may see; nobody sees padding."""
    batch = []
    for dm, coins, tokens in zip(stays, alone, keep, strict=True):
        rows = []
        for i in range(len(dm)):
            if dm[i] != 1:
                row = torch.zeros(len(dm)) if coins[i] else torch.ones(len(dm))
                row[i] = 1 if coins[i] else 0
            else:
                row = dm
            rows.append(row.bool() & tokens)
        batch.append(torch.stack(rows))
    seen = torch.stack(batch)[:, None]
    return seen & torch.ones(N, N).tril().bool() if causal else seen


def dense(layer, x, seen):
    q, k, v = layer.project(x, x)
    w = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~seen, -math.inf).softmax(-1).nan_to_num(0)
    return layer.merge(w @ v, x)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [N, 9])
def test_training_is_the_official_loop(causal, length):
    layer, x = made(Masked, causal=causal)
    keep = torch.arange(N) < torch.tensor([[N], [length]])
    torch.manual_seed(7)
    out = layer(x, keep=None if length == N else keep)
    torch.manual_seed(7)
    hidden, coins = torch.rand(2, 2, N)
    seen = official((hidden >= RATE).long(), coins < 0.5, keep, causal)
    torch.testing.assert_close(out, dense(layer, x, seen))
    up = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=out.dtype)
    grads = [torch.autograd.grad((y * up).sum(), layer.q.weight) for y in (out, dense(layer, x, seen))]
    torch.testing.assert_close(*grads)  # the backward pass sees the same draw


def test_each_call_draws_anew_and_in_use_nothing_is_hidden():
    layer, x = made(Masked, causal=False)
    assert (layer(x) - layer(x)).abs().max() > 1e-3
    plain = MultiHead(layer.spec, WIDTH, HEADS).double()
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(layer.eval()(x), plain(x))
    unchanged, x = made(Masked, rate=0.0)
    assert torch.equal(unchanged.train()(x), unchanged.eval()(x))


def test_a_share_is_hidden():
    layer, _ = made(Masked)
    q = torch.zeros(64, 1, 50, 1)
    torch.manual_seed(0)
    reads = layer.noisy(q, q, torch.eye(50).expand(64, 1, 50, 50), layer.spec)[:, 0] > 0  # who reads whom, causal
    unhidden = reads[:, -1, :-1].float().mean()  # the last token sees those that are not hidden, or all, or none
    assert abs(unhidden - (1 - RATE) * (1 - RATE) - RATE / 2) < 0.08


def test_the_layers_to_compare_with():
    drop, x = made(regularized.DroppedHeads)
    q, k, v = drop.project(x, x)
    torch.manual_seed(3)
    out = drop.noisy(q, k, v, drop.spec)
    torch.manual_seed(3)
    whole = torch.rand(2, HEADS, 1, 1) >= RATE
    heads = drop.eval().attend(q, k, v)
    scale = HEADS / whole.sum(1, keepdim=True).clamp(min=1)
    torch.testing.assert_close(out, heads * whole * scale)
    weights, _ = made(regularized.DroppedWeights)
    mean = torch.stack([weights.noisy(q, k, v, weights.spec) for _ in range(400)]).mean(0)
    torch.testing.assert_close(mean, heads, atol=0.25, rtol=0)
    assert (weights.noisy(q, k, v, weights.spec) - heads).abs().max() > 0.1


def test_the_task_asks_for_each_words_head():
    tokens, heads = next(regularized.parsed(5))
    for row, sentence in enumerate(s for s, _ in zip(grammar(5), range(len(tokens)), strict=False)):
        for i, head in enumerate(sentence.heads.tolist()):
            assert heads[row, i] == (0 if head < 0 else sentence.tokens[head])
        assert (heads[row, len(sentence.tokens) :] == -100).all()


def test_rates_out_of_range_are_refused():
    with pytest.raises(SpecError, match="below 1"):
        TLM(1.0)
