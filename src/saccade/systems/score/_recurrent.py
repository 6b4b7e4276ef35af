"""A recurrent translator whose attention is exchangeable, and BLEU: what claims about attention before transformers
need."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from ._translation import told

if TYPE_CHECKING:
    from ...worlds.translation import Translation


class Translator(nn.Module):
    """An LSTM reads the source, another says the target; ``attention`` changes its states and is fed to its next step.

    Args:
        vocab, width: sizes; source and target share a table.
        attention: makes a module of ``(state [B, 1, width], memory [B, M, width], keep=, start=)``; ``None``: without.
    """

    def __init__(self, vocab: int, width: int, attention: Callable[[], nn.Module] | None):
        super().__init__()
        self.table = nn.Embedding(vocab, width)
        self.attention = None if attention is None else attention()
        self.reader = nn.LSTM(width, width, batch_first=True)
        self.writer = nn.LSTMCell(width if attention is None else 2 * width, width)
        self.out = nn.Linear(width, vocab)

    def forward(self, source: Tensor, target: Tensor, keep: Tensor) -> Tensor:
        """Logits ``[B, T, vocab]`` of what follows each token of the target ``[B, T]``; ``keep`` marks the source's."""
        return self.run(source, keep, target, target.shape[1])[0]

    @torch.no_grad()
    def translate(self, source: Tensor, keep: Tensor, first: Tensor, count: int) -> Tensor:
        """The likeliest token after ``first [B, 1]``, and so on ``count`` times: ``[B, count]``."""
        return self.run(source, keep, first, count)[1]

    def run(self, source: Tensor, keep: Tensor, target: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """Logits and likeliest tokens of each step; after the target's tokens it hears its own."""
        packed = pack_padded_sequence(self.table(source), keep.sum(1), batch_first=True, enforce_sorted=False)
        packed, (state, cell) = self.reader(packed)
        memory, state, cell = pad_packed_sequence(packed, batch_first=True)[0], state[0], cell[0]
        logits: list[Tensor] = []
        said: list[Tensor] = []
        spoken = torch.zeros_like(state)
        for step in range(steps):
            x = self.table(target[:, step] if step < target.shape[1] else said[-1])
            state, cell = self.writer(x if self.attention is None else torch.cat([x, spoken], -1), (state, cell))
            spoken = state
            if self.attention is not None:
                spoken = self.attention(state[:, None], memory, keep=keep, start=step)[:, 0]
            logits.append(self.out(spoken))
            said.append(logits[-1].argmax(-1))
        return torch.stack(logits, 1), torch.stack(said, 1)


def bleu(model: Any, given: Translation) -> Tensor:
    """Corpus BLEU (up to 4 words, no smoothing, in percent) of a batch, as a :class:`Translator` says it."""
    source, target, keep, labels = told(given)
    spoken = model.translate(source, keep, target[:, :1], labels.shape[1])
    end = int(labels[0][labels[0] != -100][-1])
    wanted = [row[row != -100].tolist() for row in labels]
    return torch.tensor(corpus_bleu([_until(row.tolist(), end) for row in spoken], [row[:-1] for row in wanted]))


def corpus_bleu(said: list[list[int]], wanted: list[list[int]]) -> float:
    """BLEU (Papineni et al., 2002) in percent, one reference for each sentence."""
    precisions = []
    for n in range(1, 5):
        pairs = [(_grams(a, n), _grams(b, n)) for a, b in zip(said, wanted, strict=True)]
        total = sum(a.total() for a, _ in pairs)
        precisions.append(sum((a & b).total() for a, b in pairs) / total if total else 0.0)
    if not min(precisions):
        return 0.0
    short = min(0.0, 1 - sum(map(len, wanted)) / sum(map(len, said)))
    return 100 * math.exp(short + sum(map(math.log, precisions)) / 4)


def _grams(words: list[int], n: int) -> Counter[tuple[int, ...]]:
    return Counter(zip(*(words[i:] for i in range(n)), strict=False))


def _until(words: list[int], end: int) -> list[int]:
    return words[: words.index(end)] if end in words else words
