"""Translation: rules over the parse of the written source give the same target and the same alignment."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade.worlds.batches import IGNORED, batch
from saccade.worlds.grammar import SMALL, Sizes, words
from saccade.worlds.translation import BOS, EOS, target_words, translation
from streams import assert_streams
from test_world_grammar import Parser, lemma, written

Said = list[tuple[str, int | None]]


def translate(source: list[str], order: str, genders: int) -> Said:
    """The target's words, each with the place of the source word that it says."""
    found = Parser(source).sentence()

    def of(head: int, role: str) -> Said:
        return [
            word for i in sorted(found.heads) if (found.heads[i], found.roles[i]) == (head, role) for word in say(i)
        ]

    def say(place: int) -> Said:
        word, role = source[place], found.roles[place]
        if word.startswith("det"):
            return []
        if word.startswith("adj"):
            return [(f"{word}.{lemma(source[found.heads[place]]) % genders}", place)]
        here: Said = [(word, place)]
        if word.startswith("noun"):
            case, small, more = of(place, "case"), of(place, "amod"), of(place, "nmod") + of(place, "acl")
            mark: Said = [("acc0", None)] if role == "obj" else []
            return {
                "svo": case + small + here + more + mark,
                "sov": here + small + more + case + mark,
                "final": more + here + small + case + mark,
            }[order]
        if not word.startswith("v"):
            return here
        link, that, more = of(place, "cc"), of(place, "mark"), of(place, "conj")
        who, how, what = of(place, "nsubj"), of(place, "advmod"), of(place, "obj")
        return {
            "svo": link + that + who + how + here + what + more,
            "sov": link + that + who + how + what + here + more,
            "final": link + who + how + what + here + that + more,
        }[order]

    (root,) = (i for i, head in found.heads.items() if head == -1)
    return [(BOS, None), *say(root), (EOS, None)]


@given(
    seed=st.integers(0, 10**6),
    order=st.sampled_from(["svo", "sov", "final"]),
    depth=st.integers(0, 3),
    genders=st.integers(1, 4),
)
@settings(max_examples=30, deadline=None)
def test_rules_over_the_written_source_give_the_target_and_its_alignment(seed, order, depth, genders) -> None:
    sizes = Sizes(depth=depth, clauses=3)
    for pair in islice(translation(seed, sizes, order=order, genders=genders), 4):
        expected = translate(written(pair.tokens, words(sizes)), order, genders)
        assert written(pair.target, target_words(sizes, genders)) == [word for word, _ in expected]
        assert torch.equal(pair.labels, pair.target[1:])
        assert pair.alignment.dtype == torch.bool and pair.alignment.shape == (len(pair.target), len(pair.tokens))
        links = [(i, said) for i, (_, said) in enumerate(expected) if said is not None]
        assert [(int(i), int(j)) for i, j in pair.alignment.nonzero()] == links


def test_the_example_of_the_docstring() -> None:
    source = ["det0", "noun1", "vt0", "det1", "adj0", "noun3", "that0", "vi0"]
    target = ["noun1", "vi0", "that0", "noun3", "adj0.1", "acc0", "vt0"]
    assert [word for word, _ in translate(source, "final", 2)[1:-1]] == target


def test_orders_differ_in_how_far_words_move() -> None:
    def crossings(order: str) -> float:
        crossed = links = 0
        for pair in islice(translation(0, order=order), 300):
            source = pair.alignment.nonzero()[:, 1]
            crossed += int((source[:, None] > source[None]).triu().sum())
            links += len(source)
        return crossed / links

    assert crossings("svo") == 0 < crossings("sov") < crossings("final")


def test_one_seed_names_one_stream_and_a_batch_pads() -> None:
    assert_streams(lambda seed: translation(seed))
    many = batch(translation(0), 6)
    lengths = [len(pair.target) for pair in islice(translation(0), 6)]
    assert many.alignment.shape == (*many.target.shape, many.tokens.shape[1])
    assert (many.labels != IGNORED).sum(1).tolist() == [n - 1 for n in lengths]
    assert (many.target != 0).sum(1).tolist() == lengths


def test_what_cannot_be_made_is_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match="expected order to be one of svo, sov, final, got 'vso'"):
        next(translation(0, order="vso"))
    with pytest.raises(ValueError, match="expected genders to be 1 to 12, got 0"):
        next(translation(0, SMALL, genders=0))
