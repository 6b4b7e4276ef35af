"""Recursive ROAR: measures against autograd through one-hot vectors, masks and areas by hand, a Llama's prompt."""

from typing import get_args

import pytest
import torch
import torch.nn.functional as F

from saccade.core.errors import SpecError
from saccade.study.hosted_laws import small_model, some_tokens
from saccade.study.laws import check
from saccade.systems.explain._classifier import Classifier, opinions
from saccade.systems.explain._importance import Measure, of_classifier
from saccade.systems.explain.recursive_roar import RecursiveROAR, masked_more, racu

torch.set_num_threads(1)


def test_check():
    for measure in get_args(Measure):
        results = check(RecursiveROAR, {"measure": measure, "samples": 3})
        assert [result.status for result in results] == ["passed"] * len(results)
    with pytest.raises(SpecError, match="measure"):
        RecursiveROAR("shap")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Classifier(width=16).double().eval()


@pytest.fixture(scope="module")
def batch():
    return next(opinions(2, 4))[:2]


def by_onehot(model, batch, scale=1.0):
    """d logit of the label / d onehot ``[B, N, vocab]``, and the one-hot vectors."""
    tokens, labels = batch
    onehot = F.one_hot(tokens, len(model.embed.weight)).double() * scale
    onehot.requires_grad_()
    logits = model.read(tokens, embedded=onehot @ model.embed.weight).logits
    return torch.autograd.grad(logits[range(len(labels)), labels].sum(), onehot)[0], onehot.detach() / scale


def test_gradients_are_by_onehot(model, batch):
    gradient, onehot = by_onehot(model, batch)
    found = of_classifier(model, *batch, "gradient")
    assert torch.allclose(found, gradient.norm(dim=-1))
    assert torch.allclose(of_classifier(model, *batch, "input x gradient"), (gradient * onehot).sum(-1).abs())


def test_integrated_gradient(model, batch):
    steps = [by_onehot(model, batch, s / 5) for s in range(1, 6)]
    wanted = (torch.stack([g for g, _ in steps]).mean(0) * steps[0][1]).sum(-1).abs()
    assert torch.allclose(of_classifier(model, *batch, "integrated gradient", 5), wanted)


def test_one_token_integrates_to_its_logit(model):
    """Of a sentence of one word it is what the logit gains from an embedding of zero to the word's."""
    tokens, labels = torch.tensor([[40]]), torch.tensor([1])
    found = of_classifier(model, tokens, labels, "integrated gradient", 400)
    zero = torch.zeros(1, 1, 16, dtype=torch.float64)
    gain = (model.read(tokens).logits - model.read(tokens, embedded=zero).logits)[0, 1].abs()
    assert found.item() == pytest.approx(gain.item(), rel=1e-2)


def test_attention_and_random(model, batch):
    assert torch.equal(of_classifier(model, *batch, "attention"), model.read(batch[0]).weights)
    a, b = (of_classifier(model, *batch, "random") for _ in range(2))
    assert not torch.equal(a, b)


def test_masks_grow():
    tokens = torch.tensor([[5, 6, 7, 8, 9], [5, 6, 0, 0, 0]])
    importance = torch.tensor([[0.1, 0.5, 0.2, 0.9, 0.0], [0.0, 0.3, 9.0, 9.0, 9.0]])
    once = masked_more(tokens, importance, 0.4, 99)
    assert once.tolist() == [[5, 99, 7, 99, 9], [5, 6, 0, 0, 0]]
    again = masked_more(once, torch.tensor([[0.3, 0.0, 0.2, 0.0, 0.1], [0.0, 1.0, 9.0, 9.0, 9.0]]), 0.6, 99)
    assert again.tolist() == [[99, 99, 7, 99, 9], [5, 99, 0, 0, 0]]
    assert masked_more(tokens, importance, 1.0, 99).tolist() == [[99] * 5, [99, 99, 0, 0, 0]]


def test_area_in_closed_form():
    baseline = [0.9, 0.8, 0.7, 0.5]
    assert racu(baseline, baseline) == 0
    assert racu([0.9, 0.5, 0.5, 0.5], baseline) == pytest.approx((0.3 + 0.2) / (0.2 + 0.3 + 0.2))
    assert racu([0.9, 0.9, 0.9, 0.5], baseline) == pytest.approx(-0.3 / 0.7)


def test_a_prompt_of_a_llama():
    """The last query's attention, by the model's own eager weights, chooses what is masked; decoding is left alone."""
    model, tokens, seen = small_model(), some_tokens(2, 20), []
    model.set_attn_implementation("eager")
    weights = model(tokens, output_attentions=True).attentions
    mean = torch.stack([w[:, :, -1].mean(1) for w in weights]).mean(0)
    model.set_attn_implementation("sdpa")
    wanted = tokens.scatter(1, mean.topk(4).indices, 95)
    hook = model.model.embed_tokens.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with RecursiveROAR(step=0.2, mask=95).apply(model), torch.no_grad():
        model(tokens)
        assert torch.equal(seen[-1], wanted)
        model(input_ids=tokens[:, :1])
        assert torch.equal(seen[-1], tokens[:, :1])
    hook.remove()
