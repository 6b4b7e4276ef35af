"""Virtual adversarial training of attention: against divergences written out, on a classifier and on a Llama."""

import pytest
import torch

from saccade.core.errors import SpecError
from saccade.study.hosted_laws import small_model, some_tokens
from saccade.study.laws import check
from saccade.systems.explain._classifier import Classifier, cross_entropy, opinions
from saccade.systems.explain.attention_at import spread
from saccade.systems.explain.attention_vat import AttentionVAT, kl, partly_labelled, virtual

torch.set_num_threads(1)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Classifier().double()


@pytest.fixture(scope="module")
def tokens():
    return next(opinions(0, 6))[0]


def written_out(model, tokens, shift):
    p, q = (model.read(tokens, r).logits.softmax(-1) for r in (0.0, shift))
    return (p.detach() * (p.detach() / q).log()).sum(-1).mean()


def test_check():
    assert not [result for result in check(AttentionVAT) if result.status == "failed"]


@pytest.mark.parametrize("interpretable", [False, True])
def test_the_divergence_is_that_of_the_paper(model, tokens, interpretable):
    system = AttentionVAT(size=2.0, probe=0.3, interpretable=interpretable)
    torch.manual_seed(5)
    found = system.divergence(model, tokens)
    torch.manual_seed(5)
    keep = tokens != 0
    draw = torch.randn(tokens.shape, dtype=torch.float64) * keep
    r = (0.3 * draw / draw.norm(dim=1, keepdim=True)).requires_grad_()
    written_out(model, tokens, r).backward()
    g = r.grad * (spread(model.read(tokens).scores.detach(), keep) if interpretable else 1)
    worst = 2 * g / g.norm(dim=1, keepdim=True)
    wanted = written_out(model, tokens, worst)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5)
    parameters = [model.out.weight, model.energy[0].weight, model.embed.weight]
    for a, b in zip(torch.autograd.grad(found, parameters), torch.autograd.grad(wanted, parameters), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_the_shift_is_nearly_the_worst(model, tokens):
    """Above any of many random shifts of its size, where it is small."""
    logits = model.read(tokens[:1]).logits.detach()
    keep = (tokens[:1] != 0).double()
    run = lambda shifts: kl(logits, model.read(tokens[:1], shifts[0]).logits)  # noqa: E731
    (r,) = virtual(run, [keep], 0.1, 0.1)
    draws = torch.randn(200, *keep.shape, dtype=torch.float64) * keep
    draws = 0.1 * draws / draws.norm(dim=-1, keepdim=True)
    assert run([r]) > 0.95 * max(run([draw]) for draw in draws)
    assert r.norm().item() == pytest.approx(0.1) and not r[keep == 0].any()


def test_labels_matter_for_the_cross_entropy_alone(model, tokens):
    labels = torch.tensor([0, 1, 1, 0, 1, 0])
    system, parts = AttentionVAT(size=1.0), []
    for given in (labels, 1 - labels):
        torch.manual_seed(1)
        parts.append(system.objective(model, (tokens, given, tokens)) - cross_entropy(model, (tokens, given)))
    assert parts[0].item() == pytest.approx(parts[1].item()) and parts[0] > 0


def test_sentences_without_labels_outnumber():
    stream = partly_labelled(3)
    batches = [next(stream) for _ in range(6)]
    assert torch.equal(batches[0][0], batches[4][0]) and not torch.equal(batches[0][2], batches[4][2])


def test_a_llama():
    model, tokens = small_model(), some_tokens(2, 9)

    def logits():
        return model(tokens, use_cache=False).logits

    with AttentionVAT(size=0.5).apply(model) as smoother:
        found = smoother.divergence(logits, *tokens.shape)
    found.backward()
    assert found > 1e-4 and all(bool(p.grad.any()) for p in model.model.layers.parameters())
    with pytest.raises(SpecError, match="leave it out"):
        AttentionVAT(interpretable=True).apply(model)
