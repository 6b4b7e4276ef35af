"""Sentences with an opinion, of which it is known what words decide it.

A sentence of the grammar has an opinion if its adjectives do not balance: those of even number praise, the others
blame, and in a scene with the adverb of number 0 ("not") each tells the other way. Their sum is the label; the
adjectives and that adverb are the evidence, all other words are not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from .batches import batch
from .grammar import ROLES, Sentence, Sizes, grammar, words

__all__ = ["SIZES", "Opinion", "batch", "decisive", "opinion", "opinions"]

SIZES = Sizes(nouns=20, adjectives=24, verbs=16, adverbs=3)


@dataclass(frozen=True, eq=False)
class Opinion:
    """tokens: int64 [N], places in ``words(SIZES)``. label: int64 [], 1 for praise. evidence: bool [N]."""

    tokens: Tensor
    label: Tensor
    evidence: Tensor


def opinions(seed: int | str) -> Iterator[Opinion]:
    """Endless sentences that praise or blame."""
    for sentence in grammar(seed, SIZES):
        if told := opinion(sentence):
            yield Opinion(sentence.tokens, torch.tensor(int(told > 0)), decisive(sentence.tokens))


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
    signs = torch.zeros(len(words(SIZES)), dtype=torch.int64)
    for number in range(SIZES.adjectives):
        signs[words(SIZES)[f"adj{number}"]] = 1 - 2 * (number % 2)
    return signs
