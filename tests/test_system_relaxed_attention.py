"""Relaxed attention against its equation, and when it acts."""

import math

import pytest
import torch

from saccade import SpecError, attention, weights
from saccade.core.masks import Padding
from saccade.nn import Encoder
from saccade.systems.score import relaxed_attention as relaxed
from saccade.systems.score.relaxed_attention import RelaxedAttention

torch.set_num_threads(1)


def dense(q, k, share, causal, keep=None):
    s = q @ k.mT / math.sqrt(q.shape[-1])
    hidden = torch.zeros(s.shape[-2:], dtype=torch.bool)
    if causal:
        hidden = torch.ones(s.shape[-2:]).triu(1).bool()
    hidden = hidden if keep is None else hidden | ~keep[:, None, None]
    w = s.masked_fill(hidden, -math.inf).softmax(-1)
    return ((1 - share) * w + share / (~hidden).sum(-1, keepdim=True)).masked_fill(hidden, 0)


@pytest.mark.parametrize("causal", [True, False])
def test_relaxed_attention_is_its_equation(causal):
    q, k = torch.randn(2, 2, 3, 11, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind(0)
    spec = RelaxedAttention(0.3, causal=causal).build(3)
    torch.testing.assert_close(weights(q, k, spec), dense(q, k, 0.3, causal))
    keep = torch.arange(11) < torch.tensor([11, 6])[:, None]
    spec.mask = spec.mask & Padding(keep)
    torch.testing.assert_close(weights(q, k, spec), dense(q, k, 0.3, causal, keep))


@pytest.mark.parametrize("backend", ["reference", "band"])
def test_it_acts_in_training_and_in_use_only_if_matched(backend):
    q, k, v = torch.randn(3, 1, 2, 40, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind(0)
    for matched in (False, True):
        spec = RelaxedAttention(0.3, matched).build(2)
        both = []
        for share, training in ((0.3, True), (0.3 if matched else 0.0, False)):
            found = attention(q, k, v, spec.train(training), backend=backend)
            torch.testing.assert_close(found, dense(q, k, share, True) @ v)
            both.append(found)
        assert torch.equal(*both) == matched


def test_a_model_hands_its_mode_down():
    torch.manual_seed(0)
    plain, ours = Encoder(20, 16, 1, 2), Encoder(20, 16, 1, 2, attention=RelaxedAttention(0.5, causal=False))
    ours.load_state_dict(plain.state_dict(), strict=False)
    tokens = torch.randint(20, (2, 9))
    torch.testing.assert_close(ours.eval()(tokens), plain.eval()(tokens))
    assert (ours.train()(tokens) - plain.train()(tokens)).abs().max() > 1e-4


def test_fusion_with_a_model_that_knows_the_answer_takes_the_loss_away():
    labels = torch.tensor([[3, 1, -100]])
    sure = torch.nn.functional.one_hot(labels.clamp(min=0), 5) * 20.0
    blind = torch.zeros(1, 3, 5)
    held = [(None, None, None, labels)]
    found = relaxed._fused(lambda *given: blind, lambda target: sure, held)
    weight = max(relaxed.FUSIONS)
    assert found == pytest.approx(math.log(5) - math.log(1 + 4 * math.exp(-20 * weight)), abs=1e-4)
    assert relaxed._fused(lambda *given: sure, lambda target: blind, held) == pytest.approx(0, abs=1e-6)


def test_shares_out_of_range_are_refused():
    with pytest.raises(SpecError, match=r"0\.\.1"):
        RelaxedAttention(1.5)
