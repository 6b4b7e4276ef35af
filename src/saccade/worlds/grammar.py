"""Sentences of a small probabilistic grammar (:mod:`.trees`), with their dependency trees and their scenes.

A scene is what one verb tells, in the sense of UCCA: the verb, its adverb, the phrases of those who take part, and
the noun that a relative clause is about. "and", which only links scenes, is in none; a clause inside a phrase is a
scene of its own, left out of the one around it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from .batches import UNLABELLED, batch
from .trees import ROLES, SMALL, VERBS, Sizes, Split, Word, trees

__all__ = ["PAD", "ROLES", "SMALL", "Sentence", "Sizes", "batch", "grammar", "parsed", "words"]

PAD = "<pad>"  # id 0 in every vocabulary


@dataclass(frozen=True, eq=False)
class Sentence:
    """tokens, heads, roles: int64 [N]: the word, the place of its head (the root: -1) and its role, from ROLES.

    scenes: bool [scenes, N], in the order in which their verbs are said.
    """

    tokens: Tensor
    heads: Tensor = field(metadata=UNLABELLED)
    roles: Tensor = field(metadata=UNLABELLED)
    scenes: Tensor


def grammar(seed: int | str, sizes: Sizes = SMALL, split: Split = "any") -> Iterator[Sentence]:
    """Endless sentences; a token is a place in :func:`words`."""
    for tree in trees(seed, sizes, split):
        yield parsed(tree, sizes)


@cache
def words(sizes: Sizes = SMALL) -> dict[str, int]:
    """The vocabulary, each word with its token."""
    forms = [f"noun{i}{s}" for i in range(sizes.nouns) for s in ("", ".pl")]
    forms += [f"{kind}{i}{s}" for kind in VERBS for i in range(sizes.verbs // 2) for s in ("", ".pl")]
    counts = {"adj": sizes.adjectives, "adv": sizes.adverbs, "prep": sizes.prepositions, "det": 2, "that": 1, "and": 1}
    forms += [f"{kind}{i}" for kind, count in counts.items() for i in range(count)]
    return {form: i for i, form in enumerate([PAD, *forms])}


def parsed(tree: Word, sizes: Sizes) -> Sentence:
    """The sentence of a tree, and what is known about it."""
    said, vocabulary = tree.said(), words(sizes)
    place = {id(word): i for i, word in enumerate(said)}
    heads = {id(word): -1 if head is None else place[id(head)] for word, head in tree.tree() if id(word) in place}
    verbs = [word for word in said if word.kind in VERBS]
    scenes = torch.zeros(len(verbs), len(said), dtype=torch.bool)
    for scene, verb in zip(scenes, verbs, strict=True):
        scene[[place[id(word)] for word in _told(verb)]] = True
        if verb.role == "acl":
            scene[heads[id(verb)]] = True
    return Sentence(
        torch.tensor([vocabulary[str(word)] for word in said]),
        torch.tensor([heads[id(word)] for word in said]),
        torch.tensor([ROLES.index(word.role) for word in said]),
        scenes,
    )


def _told(word: Word) -> Iterator[Word]:
    yield word
    for below in word.below:
        if below.role not in ("cc", "acl", "conj"):
            yield from _told(below)
