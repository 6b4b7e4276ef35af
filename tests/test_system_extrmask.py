"""ExtrMask: masks against planted models, the loss against its equation, areas against closed forms."""

import pytest
import torch
import torch.nn.functional as F

from saccade import catalog
from saccade.core.errors import SpecError
from saccade.study import laws
from saccade.systems.explain._series import areas, arma, rare_places, states
from saccade.systems.explain.extrmask import ExtrMask, Learned

torch.set_num_threads(1)


def series(count=4, times=12, features=5):
    return 1 + torch.rand(count, times, features, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("delete", [False, True])
def test_the_loss_is_that_of_the_equations(delete):
    x = series()
    torch.manual_seed(0)
    m, p = torch.rand_like(x), Learned(5)(x)

    def f(x):
        return x.square().sum(-1).sin()

    system = ExtrMask(delete=delete, mask=0.7, shown=0.3)
    wanted = f(torch.zeros_like(x)) if delete else f(x)
    if delete:
        expected = (f((1 - m) * x + m * p) - f(torch.zeros_like(x))).square().mean() + 0.7 * (1 - m).mean()
    else:
        expected = (f(m * x + (1 - m) * p) - f(x)).square().mean() + 0.7 * m.mean()
    found = system.loss(f, x, wanted, m, p, torch.zeros_like(x))
    assert torch.allclose(found, expected + 0.3 * p.abs().mean())
    below = system.loss(f, x, wanted, m - 2, p, torch.zeros_like(x)) - system.loss(f, x, wanted, m - 3, p, 0 * x)
    assert float(below.detach()) == pytest.approx(-0.7, abs=1e-4)  # hidden all the same, and pulled back to the border


def test_the_perturbation_reads_both_ways_and_is_a_line_of_unit_vectors():
    torch.manual_seed(0)
    learned, x = Learned(5), series().requires_grad_()
    learned(x)[0, 6].sum().backward()
    assert (x.grad[0].abs().sum(-1) > 0).all() and not x.grad[1:].any()
    hidden = learned.rnn(x)[0]
    unit = hidden / hidden.square().sum(-1, keepdim=True).sqrt()
    assert torch.allclose(learned(x), unit @ learned.out.weight.T + learned.out.bias, atol=1e-6)


@pytest.mark.parametrize(("perturbation", "delete"), [("zero", False), ("learned", False), ("zero", True)])
def test_what_a_planted_model_reads_is_found(perturbation, delete):
    x, needed = series(), torch.zeros(4, 12, 5, dtype=torch.bool)
    needed[:2, 3:6, 1] = needed[2:, 8:10, 4] = True  # each series has places of its own
    found = ExtrMask(perturbation, delete, mask=0.5, steps=60, rate=0.05).explain(
        lambda x: 10 * (x * needed).sum((1, 2)), x
    )
    assert found.shape == x.shape and float(found.amin()) >= 0 and float(found.amax()) <= 1
    if delete:  # 1 is where nothing may stay
        assert found[needed].mean() > 0.8 and found[~needed].min() > 0.9
    else:
        assert found[needed].mean() > 0.4 and found[~needed].max() < 0.05


def test_where_the_mean_stands_a_constant_series_needs_nothing():
    x = torch.ones(2, 6, 3)
    found = {kind: ExtrMask(kind, steps=200, mask=0.3).explain(lambda x: 3 * x.sum(-1), x) for kind in ("mean", "zero")}
    assert not found["mean"].any() and found["zero"].min() > 0.5


def test_areas_have_their_closed_forms():
    true = torch.zeros(1, 4, 5, dtype=torch.bool)
    true[0, 1] = True  # 5 of 20
    assert areas(true.float(), true) == pytest.approx(((0.25 + 1) / 2, 1.0), abs=1e-4)
    assert areas(1 - true.float(), true)[1] == pytest.approx(0.5, abs=1e-4)  # all is found at threshold 0 alone
    found = torch.rand(1, 4, 5, generator=torch.Generator().manual_seed(0))
    flat, hits = ((found - found.min()) / (found.max() - found.min() + 1e-5)).flatten(), true.flatten()
    thresholds = sorted(flat.tolist())
    precision = [float(hits[flat >= t].float().mean()) for t in thresholds]
    recall = [float(hits[flat >= t].sum() / 5) for t in thresholds]
    wanted = [
        sum((b - a) * (u + v) / 2 for a, b, u, v in zip(thresholds, thresholds[1:], y, y[1:], strict=False))
        for y in (precision, recall)
    ]
    assert areas(found, true) == pytest.approx(wanted, abs=1e-6)


def test_data_are_what_they_say():
    x = arma(40, 200, 5)
    noise = 2 * x[:, 3:] + 0.5 * x[:, 2:-1] + 0.2 * x[:, 1:-2] + 0.1 * x[:, :-3]
    assert float(noise.std()) == pytest.approx(2, rel=0.05) and float((noise[:, 1:] * noise[:, :-1]).mean()) < 0.1
    assert rare_places().sum((1, 2)).unique().tolist() == [5 * 25]
    x, labels, hidden = states("train", 400)
    assert x[hidden == 1].mean(0).tolist() == pytest.approx([-0.1, -0.4, -1.5], abs=0.05)
    assert x[hidden == 0].var(0).tolist() == pytest.approx([0.801] * 3, rel=0.1)
    assert float((hidden[:, 1:] == hidden[:, :-1]).float().mean()) == pytest.approx(0.94, abs=0.03)
    told = F.one_hot(hidden + 1, 3).bool()
    high = x[told].view(400, -1) > 1
    assert float(labels[high].float().mean()) > 0.9


def test_apply_puts_the_perturbation_in_and_takes_it_out():
    model, x = torch.nn.Linear(5, 2), series()
    with ExtrMask().apply(model) as given:
        assert torch.equal(model(x), torch.nn.functional.linear(x, model.weight, model.bias))
        given |= {"m": torch.full_like(x, 0.25), "p": 2 * x}
        assert torch.allclose(model(x), F.linear(1.75 * x, model.weight, model.bias), atol=1e-6)
    assert torch.equal(model(x), F.linear(x, model.weight, model.bias))
    with pytest.raises(SpecError, match="perturbation is one of"):
        ExtrMask("blur")


def test_no_law_fails():
    assert not [r for r in laws.check(catalog.find("extrmask")) if r.status == "failed"]
