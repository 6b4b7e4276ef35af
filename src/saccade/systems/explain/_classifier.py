"""A text classifier with one attention over a recurrent encoder, and sentences of which we know what words decide.

A sentence of the grammar has an opinion if its adjectives do not balance: those of even number praise, the others
blame, and in a scene with the adverb of number 0 ("not") each tells the other way. Their sum is the label; the
adjectives and that adverb are the evidence, all other words are not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from itertools import cycle, islice
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...worlds.grammar import ROLES, Sentence, Sizes, batch, grammar, words

SIZES = Sizes(nouns=20, adjectives=24, verbs=16, adverbs=3)
MASK = len(words(SIZES))
"""The token that stands for one taken away; 0 is padding."""
VOCABULARY = MASK + 1
BATCH = 32
HELD = 999  # the seed of sentences that are never trained on

Objective = Callable[["Classifier", tuple[Tensor, ...]], Tensor]
"""From a classifier and a batch to what its training lowers."""


class Reading(NamedTuple):
    """Logits ``[B, classes]``, attention weights ``[B, N]``, and the scores that these are the softmax of."""

    logits: Tensor
    weights: Tensor
    scores: Tensor


class Classifier(nn.Module):
    """Logits of tokens ``[B, N]``: a bidirectional LSTM, and the mean of its states by additive attention.

        h = lstm(embed(tokens));  scores = v . tanh(W h + b) + shift;  logits = U sum over j of softmax(scores)[j] h[j]

    The model of "Attention is not explanation" (arXiv:1902.10186), which most work on attention as an explanation uses.

    Args:
        vocab, width, classes: sizes; the LSTM has ``width / 2`` units in each direction.
        objective: what its training lowers; the cross-entropy of the labels if not given.
    """

    def __init__(self, vocab: int = VOCABULARY, width: int = 32, classes: int = 2, objective: Objective | None = None):
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.lstm = nn.LSTM(width, width // 2, batch_first=True, bidirectional=True)
        self.energy = nn.Sequential(nn.Linear(width, width // 2), nn.Tanh(), nn.Linear(width // 2, 1, bias=False))
        self.out = nn.Linear(width, classes)
        self.objective: Objective = objective or cross_entropy

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``[B, classes]``."""
        return self.read(tokens).logits

    def read(self, tokens: Tensor, shift: Tensor | float = 0.0, embedded: Tensor | None = None) -> Reading:
        """Read with scores that are shifted by ``[B, N]``, or other embeddings ``[B, N, width]`` than the tokens'."""
        keep = tokens != 0
        packed = nn.utils.rnn.pack_padded_sequence(
            self.embed(tokens) if embedded is None else embedded, keep.sum(1), True, enforce_sorted=False
        )
        states, _ = nn.utils.rnn.pad_packed_sequence(self.lstm(packed)[0], True, total_length=tokens.shape[1])
        scores = self.energy(states)[..., 0] + shift
        weights = scores.masked_fill(~keep, -torch.inf).softmax(-1)
        return Reading(self.out((weights[..., None] * states).sum(1)), weights, scores)

    def of_embeddings(self, tokens: Tensor) -> Callable[[Tensor], Tensor]:
        """Logits as a function of embeddings ``[B, N, width]`` in the place of these tokens'."""
        return lambda embedded: self.read(tokens, embedded=embedded).logits


def cross_entropy(model: Classifier, batch: tuple[Tensor, ...]) -> Tensor:
    """Of the labels ``[B]``, which come second in a batch, after the tokens."""
    return F.cross_entropy(model(batch[0]), batch[1])


def objective(model: Any, batch: tuple[Tensor, ...]) -> Tensor:
    """What a classifier's own training lowers: the loss of a :class:`~saccade.study.trainer.Task`."""
    return model.objective(model, batch)


def gradient(logits: Callable[[Tensor], Tensor], embedded: Tensor, labels: Tensor) -> Tensor:
    """Gradient of the labels' logits ``[B, classes]`` by embeddings ``[B, N, width]``, of which they are a function."""
    at = embedded.detach().requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(logits(at).gather(1, labels[:, None]).sum(), at)[0]


def integrated(logits: Callable[[Tensor], Tensor], embedded: Tensor, labels: Tensor, samples: int = 20) -> Tensor:
    """Integrated gradients from embeddings of zero (arXiv:1703.01365), signed, ``[B, N]``; Captum's."""
    from captum.attr import IntegratedGradients

    # One step at a time, since ``logits`` knows these sentences' lengths.
    found = IntegratedGradients(logits).attribute(
        embedded.detach(), target=labels, n_steps=samples, method="riemann_right", internal_batch_size=len(embedded)
    )
    return found.sum(-1)


def importance(model: Classifier, tokens: Tensor) -> Tensor:
    """Gradient importance ``[B, N]``: length of the gradient of the likeliest class's logit by each embedding."""
    return gradient(model.of_embeddings(tokens), model.embed(tokens), model(tokens).argmax(-1)).norm(dim=-1)


def correlation(model: Classifier, tokens: Tensor) -> Tensor:
    """Pearson's correlation of attention weights and gradient importance over a sentence's words, mean over them."""
    keep = (tokens != 0).double()
    with torch.no_grad():
        pair = [model.read(tokens).weights.double(), importance(model, tokens).double()]
    a, b = ((x - (x * keep).sum(1, True) / keep.sum(1, True)) * keep for x in pair)
    return F.cosine_similarity(a, b, dim=1).mean()


def opinions(seed: int | str, size: int = BATCH) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Endless batches: tokens ``[size, N]``, labels ``[size]`` (1: praise) and evidence, bool ``[size, N]``."""
    source = (sentence for sentence in grammar(seed, SIZES) if bool(opinion(sentence)))
    while True:
        chosen = list(islice(source, size))
        together: Sentence = batch(iter(chosen), size)
        labels = torch.tensor([int(opinion(sentence) > 0) for sentence in chosen])
        yield together.tokens, labels, decisive(together.tokens)


def opinion(sentence: Sentence) -> int:
    """Praise less blame."""
    signs = _signs()[sentence.tokens]
    turned = (sentence.scenes & (sentence.tokens == words(SIZES)["adv0"])).any(1)
    scene = sentence.scenes & (sentence.roles == ROLES.index("amod"))
    return int((signs * torch.where((scene & turned[:, None]).any(0), -1, 1)).sum())


def decisive(tokens: Tensor) -> Tensor:
    """Which tokens may be evidence, bool like ``tokens``: adjectives and "not"."""
    return (_signs()[tokens] != 0) | (tokens == words(SIZES)["adv0"])


@cache
def _signs() -> Tensor:
    """By token 1 (praise), -1 (blame) or 0."""
    signs = torch.zeros(VOCABULARY, dtype=torch.int64)
    for number in range(SIZES.adjectives):
        signs[words(SIZES)[f"adj{number}"]] = 1 - 2 * (number % 2)
    return signs


def few(batches: int, seed: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The same few batches of opinions over and over."""
    return cycle(list(islice(opinions(seed), batches)))


@cache
def held(batches: int = 8) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Batches that no seed trains on."""
    return list(islice(opinions(HELD, 2 * BATCH), batches))


def right(model: Any, batch: tuple[Tensor, ...]) -> Tensor:
    """Share of the labels that a classifier likes best."""
    return (model(batch[0]).argmax(-1) == batch[1]).float().mean()
