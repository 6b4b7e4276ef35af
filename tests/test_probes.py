"""What claims share: the regression at its optimum, AUROC by counting, a prompt's end as an eager model reads it."""

import pytest
import torch
from scipy.stats import sem, spearmanr
from torch.nn.functional import nll_loss

from saccade import Attention, SpecError, install, masks
from saccade.study.hosted_laws import small_model, some_tokens
from saccade.study.probes import (
    Detector,
    auroc,
    mean_loss,
    prose,
    reading,
    spearman,
    standard_error,
    surely_positive,
    two_fold,
)
from saccade.worlds.text import heldout


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


def test_spearman_is_that_of_scipy_and_takes_what_rounding_sets_apart_for_ties():
    x = torch.randint(9, (40,), generator=torch.Generator().manual_seed(2)).double()
    y = x + torch.randn(40, generator=torch.Generator().manual_seed(3))
    wanted = spearmanr(x, y).statistic
    assert spearman(x, y) == pytest.approx(wanted) and 0.5 < wanted < 1
    assert spearman(x * (1 + 1e-8 * torch.arange(40)), y) == pytest.approx(wanted)


def test_a_mean_is_surely_positive_beyond_two_standard_errors():
    x = torch.tensor([0.1, 0.2, 0.1, 0.4])
    assert standard_error(x) == pytest.approx(sem(x))
    for shift, sure in ((1e-4, True), (-1e-4, False)):
        assert surely_positive(x - x.mean() + 2 * standard_error(x) + shift) is sure


def test_mean_loss_is_the_models_own():
    model, texts = small_model(), some_tokens()
    with torch.no_grad():
        own = sum(float(model(text, labels=text).loss) for text in texts.split(1)) / len(texts)
        last = -model(texts).logits[:, -6:-1].log_softmax(-1).gather(-1, texts[:, -5:, None]).mean()
        with install(model, Attention(mask=masks.Window(3))):
            narrow = sum(float(model(text, labels=text).loss) for text in texts.split(1)) / len(texts)
    assert mean_loss(model, texts) == pytest.approx(own, rel=1e-5)
    assert mean_loss(model, texts, 5) == pytest.approx(float(last), rel=1e-5)
    assert mean_loss(model, texts, program=Attention(mask=masks.Window(3))) == pytest.approx(narrow, rel=1e-5) != own


def test_prose_to_learn_from_and_prose_to_judge_by_lie_apart():
    whole = heldout()
    cut = len(whole) * 3 // 4
    learn, held = prose("here", (3, 200), (2, 300))
    assert learn.shape == (3, 200) and held.shape == (2, 300) and (learn[:, 0] == 256).all()
    assert all(bytes(text[1:].tolist()) in whole[:cut] for text in learn)
    assert all(bytes(text[1:].tolist()) in whole[cut:] for text in held)
