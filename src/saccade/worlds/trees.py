"""Trees of sentences drawn from a small probabilistic grammar, before any language puts their words in order.

    S  -> C | C and S                  two clauses at most, by default
    C  -> NP adv? verb NP?             an object follows a transitive verb
    NP -> det adj? noun (PP | that adv? verb NP?)?
    PP -> prep NP

A verb agrees in number with its subject. A modifier belongs to the nearest noun before it, so a sentence in the order
written here has one parse. Roles are those of Universal Dependencies.

Compositional generalisation: every fifth pair of adjective and noun, and of verb and object, is held out. Split
"train" has sentences with none of them, "test" those with at least one; every word occurs in both.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from .batches import expect

HEAD = "head"
ORDER = ("cc", "mark", "case", "det", "amod", "nsubj", "advmod", HEAD, "obj", "nmod", "acl", "conj")
"""Which dependents stand before their head and which behind it, from left to right."""
ROLES = ("root", *(role for role in ORDER if role != HEAD))
VERBS = ("vt", "vi")  # transitive and not
HELD_OUT = 5  # one pair in so many


@dataclass(frozen=True)
class Sizes:
    """How many words of each kind (verbs: half of them transitive), phrases in phrases, and clauses in a row."""

    nouns: int = 12
    adjectives: int = 6
    verbs: int = 8
    adverbs: int = 3
    prepositions: int = 3
    depth: int = 1
    clauses: int = 2


SMALL = Sizes()
Split = Literal["any", "train", "test"]


@dataclass(eq=False)
class Word:
    """A word, its role towards its head, and its dependents; lemmas are counted by kind."""

    kind: str
    lemma: int
    role: str
    plural: bool = False
    below: list[Word] = field(default_factory=list)

    def tree(self) -> Iterator[tuple[Word, Word | None]]:
        """This word and all below it, each with its head (this one: with None)."""
        yield self, None
        for word in self.below:
            yield from ((w, self if head is None else head) for w, head in word.tree())

    def said(self, order: tuple[str, ...] = ORDER) -> list[Word]:
        """This word and all below it as one language says them; what has a role not in the order is not said."""
        phrase: list[Word] = []
        for role in order:
            phrase += [self] if role == HEAD else [w for d in self.below if d.role == role for w in d.said(order)]
        return phrase

    def __str__(self) -> str:
        return f"{self.kind}{self.lemma}{'.pl' if self.plural else ''}"


def trees(seed: int | str, sizes: Sizes, split: Split = "any") -> Iterator[Word]:
    """Endless trees of the split; where a language puts the words is left to it."""
    for name, least in (("nouns", HELD_OUT), ("adjectives", 1), ("verbs", 2), ("adverbs", 1), ("prepositions", 1)):
        expect("trees", name, getattr(sizes, name), least)
    expect("trees", "clauses", sizes.clauses, 1)
    expect("trees", "depth", sizes.depth, 0)
    if split not in ("any", "train", "test"):
        raise ValueError(f'trees: expected split to be "any", "train" or "test", got {split!r}')
    rng = random.Random(f"trees/{split}/{seed}")
    while True:
        tree = _sentence(sizes, rng)
        if split == "any" or (split == "test") == any(map(_held_out, *zip(*tree.tree(), strict=True))):
            yield tree


def _held_out(word: Word, head: Word | None) -> bool:
    return head is not None and word.role in ("amod", "obj") and (word.lemma + head.lemma) % HELD_OUT == 0


def _sentence(sizes: Sizes, rng: random.Random) -> Word:
    first = _clause("root", None, sizes.depth, sizes, rng)
    for _ in range(sizes.clauses - 1):
        if rng.random() < 0.6:
            break
        following = _clause("conj", None, sizes.depth, sizes, rng)
        following.below.append(Word("and", 0, "cc"))
        first.below.append(following)
    return first


def _clause(role: str, about: Word | None, depth: int, sizes: Sizes, rng: random.Random) -> Word:
    """A verb with its dependents; ``about``: the noun that a relative clause says something about."""
    subject = about or _noun("nsubj", depth, sizes, rng)
    kind = VERBS[rng.random() < 0.4]
    verb = Word(kind, rng.randrange(sizes.verbs // 2), role, subject.plural)
    verb.below.append(subject if about is None else Word("that", 0, "mark"))
    if rng.random() < 0.3:
        verb.below.append(Word("adv", rng.randrange(sizes.adverbs), "advmod"))
    if kind == "vt":
        verb.below.append(_noun("obj", depth, sizes, rng))
    return verb


def _noun(role: str, depth: int, sizes: Sizes, rng: random.Random) -> Word:
    noun = Word("noun", rng.randrange(sizes.nouns), role, rng.random() < 0.5)
    noun.below.append(Word("det", rng.randrange(2), "det"))
    if rng.random() < 0.5:
        noun.below.append(Word("adj", rng.randrange(sizes.adjectives), "amod"))
    modifier = rng.random() if depth else 1.0
    if modifier < 0.2:
        noun.below.append(_noun("nmod", depth - 1, sizes, rng))
        noun.below[-1].below.append(Word("prep", rng.randrange(sizes.prepositions), "case"))
    elif modifier < 0.45:
        noun.below.append(_clause("acl", noun, depth - 1, sizes, rng))
    return noun
