"""Attention flow's claim in closed form: blank-out of a model whose probabilities are known; and its laws."""

import torch

from saccade import catalog
from saccade.study import laws
from saccade.study.hosted_laws import small_model, some_tokens
from saccade.systems.explain.attention_flow import AttentionFlow, blank_out

torch.set_num_threads(1)


def test_blank_out_is_the_change_without_each_token():
    """Of a probability that is known: of a sum over the tokens, of which a blank counts nothing."""

    def predict(tokens):
        return p(torch.where(tokens == 99, 0, tokens).sum(1) / 10)

    def p(x):
        return x.exp() / (x.exp() + 299)

    tokens = torch.tensor([[3, 20, 11]])
    found = blank_out(predict, tokens, 99)
    torch.testing.assert_close(found, (p(torch.tensor(3.4)) - p(torch.tensor([3.1, 1.4, 2.3]))).abs())


def test_applied_it_keeps_what_rollout_needs():
    model, tokens = small_model(), some_tokens(1, 16)
    with AttentionFlow().apply(model) as run, torch.no_grad():
        model(tokens)
    assert run.rollout([-1]).shape == run.flow([-1]).shape == (1, 1, 16)


def test_no_law_fails():
    assert not [r for r in laws.check(catalog.find("attention-flow")) if r.status == "failed"]
