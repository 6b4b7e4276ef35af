"""Metacognition: axes against the covariance's, scores by loops, and a planted model that reports and is moved."""

from types import SimpleNamespace

import pytest
import torch

from saccade.core.errors import SpecError
from saccade.study.laws import check
from saccade.systems.explain._axes import SIZE, principal, sentences
from saccade.systems.explain.metacognition import Metacognition, control, report, scores
from saccade.worlds.text import BOS

torch.set_num_threads(1)


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=2048,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for p in model.parameters():
        p.data.mul_(5 if p.ndim > 1 else 1)
    return model


@torch.no_grad()
def test_axes_are_those_of_the_covariance_and_scores_have_deviation_one():
    model, pieces = llama(), sentences(80, "test")
    axes = principal(model, pieces, 0)
    means = []
    for piece in pieces:
        states = model(torch.tensor([[BOS, *piece]]), output_hidden_states=True).hidden_states[1][0, 1:]
        means.append(sum(states) / SIZE)
    means = torch.stack(means).double()
    centred = means - means.mean(0)
    values, vectors = torch.linalg.eigh(centred.T @ centred / 80)
    for k in (1, 2, 5):
        assert abs(float(vectors[:, -k] @ axes[k - 1].direction.double())) > 0.999
        assert abs(axes[k - 1].deviation ** 2 - float(values[-k])) < 1e-3 * float(values[-1])
        wanted = centred @ axes[k - 1].direction.double() / axes[k - 1].deviation
        found = torch.tensor(scores(model, axes[k - 1], pieces))
        torch.testing.assert_close(found, wanted.float(), rtol=1e-3, atol=1e-3)
        assert abs(float(found.std(correction=0)) - 1) < 1e-3


class Reporter(torch.nn.Module):
    """Says after a mark what the label of the line's sentence is (``shift`` 0), or its opposite (1)."""

    def __init__(self, model, axis, shift):
        super().__init__()
        self.model, self.axis, self.shift, self.config = model, axis, shift, model.config

    def __call__(self, tokens, **given):
        if tokens.shape[1] == SIZE + 1:
            return self.model(tokens, **given)
        logits = torch.zeros(*tokens.shape, 260)
        for at in (tokens[0] == ord("|")).nonzero()[:, 0].tolist():
            one = scores(self.model, self.axis, [bytes(tokens[0, at - SIZE : at].tolist())])[0] >= 0
            logits[0, at, ord("1" if one != bool(self.shift) else "0")] = 1
        return SimpleNamespace(logits=logits)


def test_reports_of_a_model_that_knows_are_right(monkeypatch):
    model, pieces = llama(), sentences(40, "test")
    axis = principal(model, pieces, 1)[0]
    apply = Metacognition.apply
    monkeypatch.setattr(Metacognition, "apply", lambda self, model: apply(self, getattr(model, "model_", model)))
    for shift in (0, 1):
        knows = Reporter(model, axis, shift)
        knows.model_ = model
        right = report(knows, axis, pieces, prompts=2, lines=8)
        assert right.tolist() == [1 - shift] * 8


def test_control_is_the_flipped_difference():
    """By hand, from pages written out again."""
    import random

    model, pieces = llama(), sentences(12, "test")
    axis = principal(model, pieces, 0)[0]
    found = control(model, axis, pieces, prompts=1, lines=4)
    *some, last = random.Random(1).sample(pieces, 4)
    labels = [score >= 0 for score in scores(model, axis, some)]

    def activation(asked, flip):
        lines = zip(some, labels, strict=True)
        page = b"".join((b"1|" if label ^ flip else b"0|") + piece + b"\n" for piece, label in lines)
        tokens = torch.tensor([[BOS, *page, *(b"1|" if asked else b"0|"), *last]])
        with torch.no_grad():
            states = model(tokens, output_hidden_states=True).hidden_states[1][0, -SIZE:]
        return float(((states - axis.mean) @ axis.direction / axis.deviation).mean())

    wanted = (activation(1, 0) - activation(0, 0) - activation(1, 1) + activation(0, 1)) / 2
    assert abs(float(found[0]) - wanted) < 1e-5 and abs(wanted) > 1e-4


def test_what_it_refuses():
    with (
        pytest.raises(SpecError, match="no layer"),
        Metacognition(type("A", (), {"layer": 9, "direction": torch.ones(32)})()).apply(llama()),
    ):
        pass


def test_its_laws():
    assert not [r for r in check(Metacognition) if r.status == "failed"]
