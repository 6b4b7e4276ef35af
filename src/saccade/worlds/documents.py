"""Documents about a topic: sentences of the grammar in which most nouns are the topic's own.

Topic t has the nouns ``NOUNS * t`` to ``NOUNS * t + NOUNS - 1``; a share of a document's nouns, ``LOOSE``, is of any.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from .batches import batch
from .grammar import Sizes, grammar, words

__all__ = ["NOUNS", "SIZES", "TOPICS", "Document", "batch", "documents"]

TOPICS, NOUNS, SENTENCES = 6, 6, 2
LOOSE = 0.2
SIZES = Sizes(nouns=TOPICS * NOUNS)


@dataclass(frozen=True, eq=False)
class Document:
    """tokens: int64 [N], places in ``words(SIZES)``. topic: int64 []."""

    tokens: Tensor
    topic: Tensor


def documents(seed: int | str, topics: range = range(TOPICS)) -> Iterator[Document]:
    """Endless documents, each about one of the topics."""
    rng, source = random.Random(f"documents/{seed}"), grammar(f"documents/{seed}", SIZES)
    tokens = {(i, form): words(SIZES)[f"noun{i}{form}"] for i in range(SIZES.nouns) for form in ("", ".pl")}
    nouns = {token: noun for noun, token in tokens.items()}
    while True:
        topic = rng.choice(topics)
        said = [token for sentence in islice(source, SENTENCES) for token in sentence.tokens.tolist()]
        for place, token in enumerate(said):
            if token in nouns and rng.random() >= LOOSE:
                number, form = nouns[token]
                said[place] = tokens[topic * NOUNS + number % NOUNS, form]
        yield Document(torch.tensor(said), torch.tensor(topic))
