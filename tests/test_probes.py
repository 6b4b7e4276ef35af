"""What claims share: the regression at its optimum, AUROC by counting, a prompt's end as an eager model reads it."""

import pytest
import torch
from torch.nn.functional import nll_loss

from saccade import SpecError
from saccade.study.hosted_laws import small_model, some_tokens
from saccade.study.probes import Detector, auroc, reading, two_fold


def some_features():
    x = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
    return x, x[:, 0] - 0.3 * x[:, 1] + 0.5 * torch.randn(60, generator=torch.Generator().manual_seed(1)) > 0


def test_the_regression_is_at_its_optimum():
    """At the least of the loss: weight = c * sum (y - p) x, and sum (y - p) = 0."""
    x, y = some_features()
    for c in (1.0, 0.1):
        found = Detector.fit(x, y, c)
        miss = y.double() - found(x)
        assert (found.weight - c * miss @ x.double()).abs().max() < 1e-5 and abs(miss.sum()) < 1e-5
    with pytest.raises(SpecError, match="both kinds"):
        Detector.fit(x, torch.ones(60))


def test_auroc_counts_pairs():
    assert auroc(torch.tensor([0.9, 0.8, 0.3, 0.3]), torch.tensor([True, False, True, False])) == 2.5 / 4


def test_two_fold_judges_what_it_has_not_seen():
    x, y = some_features()
    first, second = Detector.fit(x[:30], y[:30]), Detector.fit(x[30:], y[30:])
    assert two_fold(x, y) == (auroc(first(x[30:]), y[30:]) + auroc(second(x[:30]), y[:30])) / 2


@torch.no_grad()
def test_reading_is_that_of_attention_maps():
    model, prompts = small_model(), some_tokens()
    found = reading(model, prompts, 7)
    model.set_attn_implementation("eager")
    out = model(prompts, output_attentions=True)
    entropies = [torch.special.entr(layer[:, :, -8:-1]).sum(-1).mean() for layer in out.attentions]
    loss = nll_loss(out.logits[:, -8:-1].log_softmax(-1).flatten(0, 1), prompts[:, -7:].flatten())
    assert found == pytest.approx((float(sum(entropies) / 2), float(loss)), rel=1e-5)
