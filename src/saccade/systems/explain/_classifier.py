"""Small text classifiers: one attention over a recurrent encoder, or a BERT; and the opinions they are trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from itertools import cycle, islice
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...worlds import opinions as world
from ...worlds.grammar import words
from ...worlds.opinions import SIZES

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


class Logits(nn.Module):
    """A text classifier of transformers as a function of tokens alone, 0 being padding."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        """``[B, classes]``."""
        return self.model(tokens, attention_mask=(tokens != 0).long()).logits


def bert(vocabulary: int, classes: int, layers: int, **settings: Any) -> Logits:
    """A small, fresh BERT that classifies by the first token; ``settings`` are transformers'."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=vocabulary, hidden_size=48, intermediate_size=96, num_hidden_layers=layers, num_attention_heads=4,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **settings,
    )  # fmt: skip
    config.num_labels = classes
    return Logits(BertForSequenceClassification(config))


def cross_entropy(model: Classifier, batch: tuple[Tensor, ...]) -> Tensor:
    """Of the labels ``[B]``, which come second in a batch, after the tokens."""
    return F.cross_entropy(model(batch[0]), batch[1])


def objective(model: Any, batch: tuple[Tensor, ...]) -> Tensor:
    """What a classifier's own training lowers: the loss of a :class:`~saccade.study.trainer.Task`."""
    return model.objective(model, batch)


def opinions(seed: int | str, size: int = BATCH) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Endless batches: tokens ``[size, N]``, labels ``[size]`` and evidence, bool ``[size, N]``."""
    stream = world.opinions(seed)
    while True:
        some = world.batch(stream, size)
        yield some.tokens, some.label, some.evidence


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
