"""Variational attention: every objective against loops over words and samples, its bounds, and what padding may do."""

import math

import pytest
import torch

from saccade import SpecError
from saccade.nn.backbones import Place
from saccade.systems.score._translation import aligned
from saccade.systems.score.variational_attention import VariationalAttention, _sentences
from saccade.worlds.batches import IGNORED

torch.set_num_threads(1)
VOCAB, WIDTH = 11, 8


def made(objective="enumerated", temperature=0.5):
    torch.manual_seed(0)
    model = VariationalAttention(objective, temperature).model(VOCAB, WIDTH).double()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(20)  # far from uniform
    return model


def given():
    """Sources of 6 and 4 words, targets of 5 and 3, padded."""
    torch.manual_seed(1)
    keep = torch.arange(6) < torch.tensor([[6], [4]])
    target = torch.randint(1, VOCAB, (2, 6))
    labels = target[:, 1:].masked_fill(torch.arange(5) >= torch.tensor([[5], [3]]), IGNORED)
    return torch.randint(1, VOCAB, (2, 6)) * keep, target[:, :-1], keep, labels


def by_hand(model, source, target, labels):
    """Of one sentence without padding, word by word: p, q, log p(y | s) of what was said, and of the mean."""
    table, form, reading = model.table.weight, model.alignment.spec.form, model.alignment.reading
    memory = model.reader(table[source][None])[0][0]
    a = model.posterior.source(table[source][None])[0][0]
    b = model.posterior.target(table[labels][None])[0][0]
    state = cell = mean = torch.zeros(WIDTH, dtype=memory.dtype)
    p, q, each, of_mean = [], [], [], []
    for t, y in enumerate(labels):
        state, cell = model.writer(torch.cat([table[target[t]], mean]), (state, cell))
        p.append(torch.stack([form.energy @ torch.tanh(form.query @ state + form.key @ m) for m in memory]).softmax(0))
        q.append(torch.stack([model.posterior.bilinear.weight @ b[t] @ x for x in a]).softmax(0))
        mean = p[-1] @ memory
        said = [torch.tanh(reading.weight @ torch.cat([state, m]) + reading.bias) for m in (*memory, mean)]
        *words, blend = [model.out(x).log_softmax(0)[y] for x in said]
        each.append(torch.stack(words))
        of_mean.append(blend)
    return *(torch.stack(x) for x in (p, q, each)), torch.stack(of_mean)


def rows():
    source, target, keep, labels = given()
    for i in range(2):
        words, length = int(keep[i].sum()), int((labels[i] != IGNORED).sum())
        yield source[i, :words], target[i, :length], labels[i, :length]


def test_soft_exact_and_the_elbo_are_the_sums_over_words():
    found = [by_hand(made(), *row) for row in rows()]
    expected = {
        "soft": [of_mean for _, _, _, of_mean in found],
        "exact": [(p * each.exp()).sum(-1).log() for p, _, each, _ in found],
        "enumerated": [(q * (each - (q / p).log())).sum(-1) for p, q, each, _ in found],
    }
    losses = {name: made(name).loss(given()) for name in expected}
    for name, values in expected.items():
        torch.testing.assert_close(losses[name], -torch.cat(values).mean())
    assert losses["enumerated"] > losses["exact"] + 0.1  # a bound, and not a tight one before training


def test_the_elbo_is_the_marginal_where_q_is_the_true_posterior():
    model = made()
    source, target, keep, labels = given()
    memory, states, prior = model.states(source, target, keep)
    index = labels.clamp(min=0)[..., None, None].expand(-1, -1, 6, 1)
    joint = prior + model.of_each(states, memory).gather(-1, index)[..., 0]
    model.posterior.forward = lambda *_: joint.log_softmax(-1)
    torch.testing.assert_close(
        model.loss((source, target, keep, labels)), made("exact").loss((source, target, keep, labels))
    )


def test_samples_have_the_elbos_value_and_gradient_on_average_and_soft_attention_as_baseline():
    """Each word drawn in turn, weighted by q, gives both exactly: REINFORCE is not biased."""
    model = made("sampled")
    batch = tuple(x[:1, :n] for x, n in zip(given(), (6, 1, 6, 1), strict=True))  # a single word to say
    p, q, each, of_mean = (x[0] for x in by_hand(model, batch[0][0], batch[1][0], batch[3][0]))
    kl, weight = (q * (q / p).log()).sum(), model.posterior.bilinear.weight
    parameters = list(model.parameters())
    total, value = [torch.zeros_like(p) for p in parameters], 0.0
    for s, share in enumerate(q.detach()):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.distributions.Categorical, "sample", lambda self, s=s: torch.full((1, 1), s))
            loss = model.loss(batch)
        value += share * loss.item()
        reinforced = kl - (each[s] - of_mean).detach() * q[s].log()
        of_q = [torch.autograd.grad(x, weight, retain_graph=True)[0] for x in (loss, reinforced)]
        torch.testing.assert_close(*of_q)
        for into, grad in zip(total, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
            if grad is not None:
                into += share * grad
    elbo = made().loss(batch)
    assert value == pytest.approx(elbo.item())
    model = made()
    expected = torch.autograd.grad(model.loss(batch), list(model.parameters()), allow_unused=True)
    for ours, theirs in zip(total, expected, strict=True):
        torch.testing.assert_close(ours, torch.zeros_like(ours) if theirs is None else theirs)


@pytest.mark.parametrize("objective, temperature", [("sampled", 0.5), ("gumbel", 1e-4)])
def test_draws_follow_q(objective, temperature):
    """Gumbel noise in a softmax that is nearly hard draws from q as well."""
    batch, model, draws = given(), made(objective, temperature), 400
    torch.manual_seed(2)
    with torch.no_grad():
        losses = torch.stack([model.loss(batch) for _ in range(draws)])
        elbo = made().loss(batch)
    assert losses.std() > 0.1
    assert abs(losses.mean() - elbo) < 4 * losses.std() / math.sqrt(draws)


def test_gumbel_blends_all_words_alike_when_hot_and_its_gradient_reaches_q():
    hot, (source, target, keep, labels) = made("gumbel", 1e7), given()
    memory, states, prior = hot.states(source, target, keep)
    blend = (memory * keep[..., None]).sum(1) / keep.sum(1, keepdim=True)
    asked = labels != IGNORED
    found = hot.say(states, blend[:, None].expand_as(states)).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    log_q = hot.posterior(hot.table(source), hot.table(labels.clamp(min=0)), keep, asked)
    kl = torch.where(keep[:, None], log_q.exp() * (log_q - prior), 0).sum(-1)
    torch.testing.assert_close(
        hot.loss((source, target, keep, labels)), (kl - found)[asked].mean(), rtol=1e-5, atol=1e-5
    )
    cold, weight = made("gumbel"), "posterior.bilinear.weight"
    of_draws, of_kl = (
        torch.autograd.grad(model.loss((source, target, keep, labels)), model.get_parameter(weight))[0]
        for model in (cold, hot)
    )
    assert (of_draws - of_kl).abs().max() > 1e-3  # hot, nothing but KL depends on q


def test_as_a_layer_it_is_what_soft_attention_reads():
    torch.manual_seed(0)
    layer = VariationalAttention().layer(Place(WIDTH, 1, 0, 1, None, None)).double()
    x, memory = torch.randn(2, 2, 6, WIDTH, dtype=torch.float64)
    keep = given()[2]
    mean = layer.prior(x, memory, keep).exp() @ memory
    torch.testing.assert_close(layer(x, memory, keep=keep), layer.read(x, mean))
    torch.testing.assert_close(layer(x[1:], memory[1:, :4])[0], layer.read(x, mean)[1])


def test_whatever_is_trained_starts_from_the_same_weights():
    first, *others = (VariationalAttention(name) for name in ("soft", "exact", "enumerated", "sampled", "gumbel"))
    torch.manual_seed(3)
    weights = first.model(VOCAB, WIDTH).state_dict()
    assert max(p.abs().max() for p in weights.values()) <= 0.1
    for other in others:
        torch.manual_seed(3)
        assert all(torch.equal(p, weights[name]) for name, p in other.model(VOCAB, WIDTH).state_dict().items())


def test_alignment_is_judged_by_words_that_have_a_counterpart():
    held = _sentences(0, 16)
    gold = held.alignment[:, 1:]
    asked = gold.any(-1)
    assert asked.any(1).all() and not asked.all(1).any()

    for share in (1, 0.6, 0):
        wrong = torch.rand(asked.shape, generator=torch.Generator().manual_seed(0)) > share
        right = 1 - wrong[asked].float().mean()
        assert aligned(torch.where(wrong[..., None], ~gold, gold).float(), held) == pytest.approx(float(right))


def test_what_cannot_be_is_refused():
    for wrong in ({"objective": "hard"}, {"temperature": 0.0}):
        with pytest.raises(SpecError, match=r"objective is one of .*soft.*got VariationalAttention"):
            VariationalAttention(**wrong)
