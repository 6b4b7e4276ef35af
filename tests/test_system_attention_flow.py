"""Attention flow's claim in closed form: ranks with ties, blank-out of a model that says one byte; and its laws."""

import pytest
import torch

from saccade import catalog
from saccade.study import laws
from saccade.study.hosted_laws import small_model, some_tokens
from saccade.systems.explain.attention_flow import AttentionFlow, blank_out, rank, spearman, surely_positive

torch.set_num_threads(1)


def test_ranks_give_ties_their_mean():
    assert (rank(torch.tensor([5.0, 1.0, 5.0, 9.0])) - rank(torch.tensor([5.0, 1.0, 5.0, 9.0])).min()).tolist() == [
        1.5, 0, 1.5, 3,
    ]  # fmt: skip
    assert rank(torch.tensor([1.0, 1.0 + 1e-7, 2.0]))[:2].unique().numel() == 1


def test_spearman_is_the_formula_of_squared_differences_without_ties():
    x, y = torch.tensor([3.0, 1.0, 7.0, 5.0, 0.5]), torch.tensor([1.0, 9.0, 2.0, 4.0, 3.0])
    d = x.argsort().argsort() - y.argsort().argsort()
    assert float(spearman(x, y)) == pytest.approx(1 - 6 * float((d**2).sum()) / (5 * 24))
    assert float(spearman(x, x.exp())) == pytest.approx(1)


def test_blank_out_is_the_change_without_each_token():
    """Of a probability that is known: of a sum over the tokens, of which a blank counts nothing."""

    def predict(tokens):
        return p(torch.where(tokens == 99, 0, tokens).sum(1) / 10)

    def p(x):
        return x.exp() / (x.exp() + 299)

    tokens = torch.tensor([[3, 20, 11]])
    found = blank_out(predict, tokens, 99)
    torch.testing.assert_close(found, (p(torch.tensor(3.4)) - p(torch.tensor([3.1, 1.4, 2.3]))).abs())


def test_only_what_is_clearly_above_nothing_counts():
    assert surely_positive(torch.tensor([0.1, 0.2, 0.1, 0.2]))
    assert not surely_positive(torch.tensor([0.5, -0.4, 0.5, -0.4]))


def test_applied_it_keeps_what_rollout_needs():
    model, tokens = small_model(), some_tokens(1, 16)
    with AttentionFlow().apply(model) as run, torch.no_grad():
        model(tokens)
    assert run.rollout([-1]).shape == run.flow([-1]).shape == (1, 1, 16)


def test_no_law_fails():
    assert not [r for r in laws.check(catalog.find("attention-flow")) if r.status == "failed"]
