"""Adversarial training of attention: against gradients by hand and finite differences, on a classifier and a Llama."""

import pytest
import torch
import torch.nn.functional as F

from saccade.core.errors import SpecError
from saccade.study.hosted_laws import small_model, some_tokens
from saccade.study.laws import check
from saccade.systems.explain._classifier import Classifier, opinions
from saccade.systems.explain._importance import correlation, importance
from saccade.systems.explain.attention_at import AttentionAT, spread, worst

torch.set_num_threads(1)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Classifier()


@pytest.fixture(scope="module")
def batch():
    return next(opinions(0, 6))


def shifted(model, batch):
    return lambda shifts: F.cross_entropy(model.read(batch[0], shifts[0]).logits, batch[1])


def test_check():
    assert not [result for result in check(AttentionAT) if result.status == "failed"]


def test_padding_changes_nothing(model, batch):
    tokens = batch[0]
    length = int((tokens[0] != 0).sum())
    alone = model.read(tokens[:1, :length])
    together = model.read(F.pad(tokens, (0, 3)))
    assert torch.allclose(alone.logits[0], together.logits[0], atol=1e-6)
    assert torch.allclose(together.weights.sum(1), torch.ones(6)) and not together.weights[:, -3:].any()


def test_shift_is_the_gradient_by_finite_differences(model, batch):
    model.double()
    loss, zero = shifted(model, batch), torch.zeros(batch[0].shape, dtype=torch.float64)
    (r,) = worst(loss, [zero], 3.0)
    gradient = torch.zeros_like(zero)
    with torch.no_grad():
        for row, place in torch.cartesian_prod(torch.arange(2), torch.arange(5)).tolist():
            step = zero.clone()
            step[row, place] = 1e-5
            gradient[row, place] = (loss([step]) - loss([-step])) / 2e-5
    assert torch.allclose(r.norm(dim=1), torch.full((6,), 3.0, dtype=torch.float64))
    for row in range(2):
        assert F.cosine_similarity(r[row, :5], gradient[row, :5], dim=0) > 1 - 1e-6
    assert not r[batch[0] == 0].any()
    assert loss([r]) > loss([zero])


def test_interpretable_is_a_gradient_of_differences(model, batch):
    """alpha of the differences d, as in interpretable AT, by autograd through r[t] = alpha[t] . d[t]."""
    model.double()
    tokens, loss = batch[0], shifted(model, batch)
    scores, keep = model.read(tokens).scores.detach(), tokens != 0
    d = (scores[:, :, None] - scores[:, None]) * (keep[:, :, None] & keep[:, None])
    for lengths, lead in ((d.flatten(1).norm(dim=1)[:, None, None], spread(scores, keep)),
                          (d.norm(dim=-1, keepdim=True).clamp(min=1e-30), None)):  # fmt: skip
        directions = d / lengths
        alpha = torch.zeros_like(d).requires_grad_()
        (g,) = torch.autograd.grad(loss([(alpha * directions).sum(-1)]), alpha)
        r = F.normalize((g * directions).sum(-1), dim=-1)
        assert torch.allclose(r, worst(loss, [scores * 0], 1.0, lead)[0], atol=1e-9)


def test_objective_is_both_losses(model, batch):
    loss = shifted(model, batch)
    zero = torch.zeros(batch[0].shape)
    (r,) = worst(loss, [zero], 5.0)
    assert torch.allclose(AttentionAT(weight=0.5).objective(model, batch), loss([zero]) + 0.5 * loss([r]))
    with_lead = AttentionAT(interpretable=True).objective(model, batch)
    assert with_lead > loss([zero]) and with_lead != AttentionAT().objective(model, batch)


def test_importance_and_correlation(model, batch):
    tokens = batch[0]
    embedded = model.embed(tokens).detach().requires_grad_()
    model.read(tokens, embedded=embedded).logits.max(1).values.sum().backward()
    assert torch.allclose(importance(model, tokens), embedded.grad.square().sum(-1).sqrt(), atol=1e-7)
    each = []
    for row in range(len(tokens)):
        n = int((tokens[row] != 0).sum())
        pair = torch.stack([model.read(tokens).weights[row, :n], importance(model, tokens)[row, :n]])
        each.append(torch.corrcoef(pair)[0, 1])
    assert torch.allclose(correlation(model, tokens).float(), torch.stack(each).mean(), atol=1e-4)


def test_a_llama_under_attack():
    model, tokens = small_model(), some_tokens(2, 9)

    def loss():
        return model(tokens, labels=tokens, use_cache=False).loss

    with AttentionAT(size=0.5).apply(model) as adversary:
        both = adversary.loss(loss, *tokens.shape)
    both.backward()
    plain = loss().item()
    assert both.item() > 2 * plain + 1e-3
    assert all(bool(p.grad.any()) for p in model.model.layers.parameters())
    with AttentionAT(size=0.0).apply(model) as adversary:
        assert adversary.loss(loss, *tokens.shape).item() == pytest.approx(2 * plain, rel=1e-5)
    with pytest.raises(SpecError, match="leave it out"):
        AttentionAT(interpretable=True).apply(model)
