"""Deceptive attention: the penalty against dense weights, of a classifier and of a Llama that is trained to hide."""

import math

import pytest
import torch

from saccade.core.errors import SpecError
from saccade.study.hosted_laws import small_model, some_tokens
from saccade.study.laws import check
from saccade.systems.explain._classifier import MASK, Classifier, cross_entropy, opinions, right
from saccade.systems.explain.deceptive_attention import DeceptiveAttention, anonymous, measured

torch.set_num_threads(1)


def test_check():
    assert not [result for result in check(DeceptiveAttention) if result.status == "failed"]


def test_penalty_in_closed_form():
    mass = torch.tensor([[0.5, 0.0], [0.75, 0.0]])
    assert DeceptiveAttention(weight=2).of(mass).item() == pytest.approx(2 * math.log(8) / 4)
    assert DeceptiveAttention(weight=2, over="max").of(mass).item() == pytest.approx(2 * math.log(4))
    assert DeceptiveAttention().of(torch.zeros(3)) == 0
    with pytest.raises(SpecError, match="over"):
        DeceptiveAttention(over="all")


def test_objective_of_a_classifier():
    torch.manual_seed(0)
    model, batch = Classifier(), next(opinions(1, 5))
    tokens, _, hidden = batch
    penalty = 0.0
    for row in range(5):
        n = int((tokens[row] != 0).sum())
        weights = model.read(tokens[row : row + 1, :n]).scores[0].detach().exp()
        penalty -= math.log(1 - float(weights[hidden[row, :n]].sum() / weights.sum())) / 5
    found = DeceptiveAttention(weight=0.1).objective(model, batch) - cross_entropy(model, batch)
    assert found.item() == pytest.approx(0.1 * penalty, rel=1e-4)


def test_the_anonymous_model_sees_no_opinion():
    torch.manual_seed(0)
    model, (tokens, labels, hidden) = Classifier(objective=anonymous), next(opinions(1, 5))
    without = tokens.clone()
    without[hidden] = MASK
    assert torch.equal(measured(model, (tokens, labels, hidden)), right(model, (without, labels)))
    assert torch.equal(anonymous(model, (tokens, labels, hidden)), cross_entropy(model, (without, labels)))


@pytest.mark.parametrize("over", ["mean", "max"])
def test_a_llama_learns_to_hide(over):
    model, tokens = small_model(), some_tokens(2, 20)
    chosen = sorted({int(token) for token in tokens[:, 5:9].flatten()})
    system = DeceptiveAttention(chosen, over=over)
    model.set_attn_implementation("eager")
    weights = model(tokens, output_attentions=True, use_cache=False).attentions[-1][:, :, -1]
    mass = (weights * torch.isin(tokens, torch.tensor(chosen))[:, None]).sum(-1)
    model.set_attn_implementation("sdpa")
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    with system.apply(model) as watching:
        model(tokens, use_cache=False)
        first = system.penalty(watching).item()
        logs = (1 - mass.detach()).log()
        assert first == pytest.approx(-float(logs.mean() if over == "mean" else logs.min()), rel=1e-4)
        for _ in range(8):
            optimizer.zero_grad()
            system.penalty(watching).backward()
            optimizer.step()
            model(tokens, use_cache=False)
        assert system.penalty(watching).item() < 0.8 * first
