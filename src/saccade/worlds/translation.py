"""Translation between two small generated languages, with the gold word alignment.

The source is :func:`.grammar.grammar`'s. The target says the same tree in an order of its own:

    "svo"     word for word
    "sov"     verbs after their objects, adverbs before those, adjectives and prepositions behind their nouns
    "final"   as "sov", and what else belongs to a noun or verb before it: relative clauses, other nouns

Everywhere its adjectives agree with the gender of their noun (which the source does not show), its articles are
missing, and an object is marked by a word that the source lacks. So "the dog sees a small cat that sleeps" becomes
"dog sleeps that cat small-F ACC sees" in "final". Every other word has exactly one counterpart.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from .batches import UNLABELLED, batch, expect
from .grammar import PAD, SMALL, Sentence, Sizes, Split, parsed, words
from .trees import HEAD, Word, trees

__all__ = ["BOS", "EOS", "ORDERS", "Translation", "batch", "target_words", "translation"]

BOS, EOS = "<bos>", "<eos>"
MARK = "acc"  # kind and role of the object's mark
ORDERS = {
    "svo": ("cc", "mark", "case", "amod", "nsubj", "advmod", HEAD, "obj", "nmod", "acl", MARK, "conj"),
    "sov": ("cc", "mark", "nsubj", "advmod", "obj", HEAD, "amod", "nmod", "acl", "case", MARK, "conj"),
    "final": ("cc", "acl", "nmod", "nsubj", "advmod", "obj", HEAD, "amod", "case", MARK, "mark", "conj"),
}


@dataclass(frozen=True, eq=False)
class Translation(Sentence):
    """A source sentence and its only translation.

    target: int64 [T], BOS first and EOS last; labels: int64 [T - 1], the target from its second token on.
    alignment: bool [T, N]: which source word a target word says; rows of BOS, EOS and the object's mark are empty.
    """

    target: Tensor
    labels: Tensor = field(metadata=UNLABELLED)
    alignment: Tensor


def translation(
    seed: int | str, sizes: Sizes = SMALL, split: Split = "any", *, order: str = "final", genders: int = 2
) -> Iterator[Translation]:
    """Endless pairs. ``genders``: into how many the nouns fall (by lemma); with 1 adjectives do not change.

    sizes, split: how long and how deep, and which combinations of words (see :mod:`.trees`).
    """
    if order not in ORDERS:
        raise ValueError(f"translation: expected order to be one of {', '.join(ORDERS)}, got {order!r}")
    expect("translation", "genders", genders, 1, sizes.nouns)
    vocabulary = target_words(sizes, genders)
    for tree in trees(seed, sizes, split):
        sentence = parsed(tree, sizes)
        place = {id(word): i for i, word in enumerate(tree.said())}
        for word, _ in list(tree.tree()):
            if word.role == "obj":
                word.below.append(Word(MARK, 0, MARK))
        head = {id(word): above for word, above in tree.tree()}
        said = tree.said(ORDERS[order])
        forms = [BOS, *(_form(word, head[id(word)], genders) for word in said), EOS]
        target = torch.tensor([vocabulary[form] for form in forms])
        alignment = torch.zeros(len(forms), len(place), dtype=torch.bool)
        for row, word in zip(alignment[1:-1], said, strict=True):
            if id(word) in place:
                row[place[id(word)]] = True
        known = (sentence.tokens, sentence.heads, sentence.roles, sentence.scenes)
        yield Translation(*known, target, target[1:], alignment)


@cache
def target_words(sizes: Sizes = SMALL, genders: int = 2) -> dict[str, int]:
    """The vocabulary of the target, each word with its token: the source's without articles, in all genders."""
    plain = [word for word in words(sizes) if not word.startswith(("det", "adj", PAD))]
    gendered = [f"adj{i}.{gender}" for i in range(sizes.adjectives) for gender in range(genders)]
    return {form: i for i, form in enumerate([PAD, BOS, EOS, f"{MARK}0", *plain, *gendered])}


def _form(word: Word, head: Word | None, genders: int) -> str:
    return f"{word}.{head.lemma % genders}" if word.kind == "adj" and head is not None else str(word)
