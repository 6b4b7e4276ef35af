"""The grammar: a parser that knows only the words finds the trees and scenes that the generator gives."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from itertools import islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade.worlds.batches import IGNORED, batch
from saccade.worlds.grammar import ROLES, SMALL, Sizes, grammar, words
from saccade.worlds.trees import HELD_OUT
from streams import assert_streams


@dataclass
class Parse:
    """heads and roles by place; scenes by the place of their verb."""

    heads: dict[int, int] = field(default_factory=dict)
    roles: dict[int, str] = field(default_factory=dict)
    scenes: dict[int, set[int]] = field(default_factory=dict)


class Parser:
    """Recursive descent, left to right, over the written words."""

    def __init__(self, sentence: list[str]):
        self.words, self.at, self.found = sentence, 0, Parse()

    def next(self, *kinds: str) -> int | None:
        if self.at < len(self.words) and re.split(r"\d", self.words[self.at])[0] in kinds:
            self.at += 1
            return self.at - 1
        return None

    def link(self, place: int, head: int, role: str) -> None:
        self.found.heads[place], self.found.roles[place] = head, role

    def sentence(self) -> Parse:
        first, _ = self.clause(None)
        self.link(first, -1, "root")
        while (linker := self.next("and")) is not None:
            verb, _ = self.clause(None)
            self.link(verb, first, "conj")
            self.link(linker, verb, "cc")
        assert self.at == len(self.words)
        return self.found

    def clause(self, about: tuple[int, int] | None) -> tuple[int, set[int]]:
        if about is None:
            subject, scene = self.phrase()
        else:
            subject, that = about
            scene = {subject, that}
        adverb = self.next("adv")
        verb = self.next("vt", "vi")
        assert verb is not None and self.words[verb].endswith(".pl") == self.words[subject].endswith(".pl")
        if about is None:
            self.link(subject, verb, "nsubj")
        else:
            self.link(that, verb, "mark")
        if adverb is not None:
            self.link(adverb, verb, "advmod")
            scene.add(adverb)
        if self.words[verb].startswith("vt"):
            thing, taking_part = self.phrase()
            self.link(thing, verb, "obj")
            scene |= taking_part
        self.found.scenes[verb] = scene | {verb}
        return verb, scene

    def phrase(self) -> tuple[int, set[int]]:
        determiner, adjective = self.next("det"), self.next("adj")
        noun = self.next("noun")
        assert determiner is not None and noun is not None
        scene = {determiner, noun}
        self.link(determiner, noun, "det")
        if adjective is not None:
            self.link(adjective, noun, "amod")
            scene.add(adjective)
        if (preposition := self.next("prep")) is not None:
            other, taking_part = self.phrase()
            self.link(other, noun, "nmod")
            self.link(preposition, other, "case")
            scene |= taking_part | {preposition}
        elif (that := self.next("that")) is not None:
            verb, _ = self.clause((noun, that))
            self.link(verb, noun, "acl")
        return noun, scene


def written(tokens: torch.Tensor, vocabulary: dict[str, int]) -> list[str]:
    """Tokens [N] as words."""
    known = {token: word for word, token in vocabulary.items()}
    return [known[token] for token in tokens.tolist()]


def lemma(word: str) -> int:
    return int("".join(filter(str.isdigit, word)))


@given(seed=st.integers(0, 10**6), depth=st.integers(0, 3), clauses=st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_a_parser_that_sees_only_the_words_finds_the_same(seed: int, depth: int, clauses: int) -> None:
    sizes = Sizes(nouns=11, verbs=6, depth=depth, clauses=clauses)
    for sentence in islice(grammar(seed, sizes), 4):
        told = written(sentence.tokens, words(sizes))
        found = Parser(told).sentence()
        assert [found.heads[i] for i in range(len(told))] == sentence.heads.tolist()
        assert [found.roles[i] for i in range(len(told))] == [ROLES[r] for r in sentence.roles]
        scenes = [{i for i, inside in enumerate(scene) if inside} for scene in sentence.scenes.tolist()]
        assert scenes == [found.scenes[verb] for verb in sorted(found.scenes)]


READ = "det0 noun1 that0 vt0 det1 noun2 adv0 vi1 and0 det0 adj0 noun3.pl prep0 det0 noun4 vi0.pl"


def test_a_sentence_read_by_hand() -> None:
    told = READ.split()
    found = Parser(told).sentence()
    assert found.scenes == {3: {1, 2, 3, 4, 5}, 7: {0, 1, 6, 7}, 15: {9, 10, 11, 12, 13, 14, 15}}
    assert [found.heads[i] for i in range(16)] == [1, 7, 3, 1, 5, 3, 7, -1, 15, 11, 11, 15, 14, 14, 11, 7]


def held_out(sentence) -> int:
    told, heads = written(sentence.tokens, words()), sentence.heads.tolist()
    links = [(told[i], told[h]) for i, h in enumerate(heads) if ROLES[sentence.roles[i]] in ("amod", "obj")]
    return sum((lemma(a) + lemma(b)) % HELD_OUT == 0 for a, b in links)


def test_the_splits_part_the_combinations_and_share_the_words() -> None:
    train, test = (list(islice(grammar(0, split=split), 800)) for split in ("train", "test"))
    assert not any(map(held_out, train)) and all(map(held_out, test))
    assert all({t for s in part for t in s.tokens.tolist()} == set(range(1, len(words()))) for part in (train, test))


def test_one_seed_names_one_stream_and_the_splits_are_others() -> None:
    assert_streams(lambda seed: grammar(seed))
    assert_streams(lambda seed: grammar(0, split="train" if seed == 7 else "test"))


def test_a_batch_is_padded_where_nothing_is_known() -> None:
    many, alone = batch(grammar(0), 8), list(islice(grammar(0), 8))
    longest = max(len(s.tokens) for s in alone)
    assert many.tokens.shape == many.heads.shape == (8, longest)
    assert many.scenes.shape == (8, max(len(s.scenes) for s in alone), longest) and many.scenes.dtype == torch.bool
    for i, s in enumerate(alone):
        n, scenes = len(s.tokens), len(s.scenes)
        assert torch.equal(many.heads[i, :n], s.heads) and bool((many.heads[i, n:] == IGNORED).all())
        assert torch.equal(many.scenes[i, :scenes, :n], s.scenes) and int(many.scenes[i].sum()) == int(s.scenes.sum())
        assert not many.tokens[i, n:].any()


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: grammar(0, Sizes(nouns=4)), "expected nouns to be at least 5, got 4"),
        (lambda: grammar(0, Sizes(depth=-1)), "expected depth to be at least 0, got -1"),
        (lambda: grammar(0, SMALL, "dev"), "got 'dev'"),
    ],
)
def test_what_cannot_be_made_is_refused_with_the_reason(make, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        next(make())
