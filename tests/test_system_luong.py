"""Luong attention against loops over words, local windows against the dense matrix, the recurrent model, and BLEU."""

import math

import pytest
import torch
from torch.nn import functional

from saccade import SpecError
from saccade.nn.backbones import Place
from saccade.systems.score import _recurrent as recurrent
from saccade.systems.score._translation import pairs, told, vocabulary
from saccade.systems.score.luong import SCORES, Attend, Luong

torch.set_num_threads(1)
WIDTH, N, M, REACH = 8, 7, 12, 3


def made(**settings):
    torch.manual_seed(0)
    layer = Luong(**{"reach": REACH, "length": 20, **settings}).layer(Place(WIDTH, 1, 0, 1, None, None)).double()
    with torch.no_grad():
        for p in layer.parameters():
            p.mul_(5)
    return layer, *torch.randn(2, 2, M, WIDTH, dtype=torch.float64)


def official(layer, h, source, score, local, t):
    """attnLayerForward.m for one state and the words of one source; as there, places count from 1."""
    words = len(source)
    form, centre = layer.form, words
    if local == "p":
        scale = torch.sigmoid(layer.point.weight @ torch.tanh(layer.inner.weight @ h))[0]
        mu = scale * words + 1
        centre = int(mu)
    elif local == "m":
        centre = min(t, words)
    raw = {}
    for s in range(1, words + 1):
        if local is not None and abs(s - centre) > REACH:
            continue
        raw[s] = {
            "dot": lambda m: h @ m,
            "general": lambda m: layer.query.weight @ h @ m,
            "concat": lambda m: form.energy @ torch.tanh(form.query @ h + form.key @ m),
            "location": lambda m, s=s: (layer.query.weight @ h)[s - 1],
        }[score](source[s - 1])
    total = sum(x.exp() for x in raw.values())
    weights = {s: x.exp() / total for s, x in raw.items()}
    if local == "p":
        weights = {s: w * torch.exp(-0.5 * ((s - mu) / (REACH / 2)) ** 2) for s, w in weights.items()}
    context = sum(w * source[s - 1] for s, w in weights.items())
    return torch.tanh(layer.out.weight @ torch.cat([context, h]))


@pytest.mark.parametrize("local", [None, "m", "p"])
@pytest.mark.parametrize("score", SCORES)
def test_attention_is_the_official_loop(score, local):
    layer, x, memory = made(score=score, local=local)
    keep = torch.arange(M) < torch.tensor([[M], [5]])
    out = layer(x[:, :N], memory, keep=keep, start=2)
    for row, words in enumerate((M, 5)):
        for t in range(N):
            expected = official(layer, x[row, t], memory[row, :words], score, local, t + 3)
            torch.testing.assert_close(out[row, t], expected)
    for p in layer.parameters():  # of the last state
        ours, theirs = (torch.autograd.grad(y.sum(), p, retain_graph=True)[0] for y in (out[1, N - 1], expected))
        torch.testing.assert_close(ours, theirs)


def test_the_model_feeds_its_last_state_back_and_does_not_read_padding():
    torch.manual_seed(0)
    model = recurrent.Translator(vocabulary(), WIDTH, lambda: Attend(Luong(), WIDTH)).double()
    source, target, keep, _ = told(next(pairs(0)))
    logits = model(source, target, keep)
    words = int(keep[1].sum())
    memory, (state, cell) = model.reader(model.table(source[1:2, :words]))
    state, cell, spoken = state[0], cell[0], torch.zeros(1, WIDTH, dtype=torch.float64)
    for t in range(4):
        state, cell = model.writer(torch.cat([model.table(target[1:2, t]), spoken], -1), (state, cell))
        spoken = model.attention(state[:, None], memory, start=t)[:, 0]
        torch.testing.assert_close(logits[1:2, t], model.out(spoken))
    said = model.translate(source, keep, target[:, :1], 5)
    forced = model(source, torch.cat([target[:, :1], said[:, :-1]], 1), keep)
    assert torch.equal(forced.argmax(-1), said)


def test_bleu_of_known_sentences():
    bleu = recurrent.corpus_bleu
    assert bleu([[1, 2, 3, 4, 5]], [[1, 2, 3, 4, 5]]) == pytest.approx(100)
    assert bleu([[1, 2, 3, 4, 5]], [[1, 2, 3, 4, 6]]) == pytest.approx(100 * (4 / 5 * 3 / 4 * 2 / 3 / 2) ** 0.25)
    assert bleu([[1, 2, 3, 4]], [[1, 2, 3, 4, 5, 6]]) == pytest.approx(100 * math.exp(1 - 6 / 4))
    assert bleu([[1, 1, 1, 1, 1]], [[1, 2, 3, 4, 5]]) == 0  # a word counts as often as the reference has it
    given = next(pairs(0))

    class Sure(torch.nn.Module):
        def translate(self, source, keep, first, count):
            return functional.pad(given.labels.clamp(min=0), (0, count - given.labels.shape[1]))

    assert float(recurrent.bleu(Sure(), given)) == pytest.approx(100)


def test_what_cannot_be_is_refused():
    layer, x, memory = made(score="location", local=None, length=4)
    with pytest.raises(SpecError, match="4 places"):
        layer(x, memory)
    for wrong in ({"score": "bilinear"}, {"local": "q"}, {"reach": 0}):
        with pytest.raises(SpecError, match="score is one of"):
            Luong(**wrong)
