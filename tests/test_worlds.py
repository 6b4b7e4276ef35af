"""The worlds: seeded, of exact length, and every answer really stands where its evidence says."""

from __future__ import annotations

import re
from collections import Counter
from itertools import islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade.worlds.batches import drawn
from saccade.worlds.recall import KEYS, WORLDS, aggregation, copy, lookup, needle, passkey, recall, tracking
from saccade.worlds.text import BOS, decode, encode, heldout, text

PROSE = b"It was a bright cold day, and the clocks were striking. " * 60


@given(task=st.sampled_from(sorted(WORLDS)), length=st.integers(280, 3000), seed=st.integers(-(2**40), 2**40))
@settings(max_examples=150, deadline=None)
def test_answers_equal_their_evidence_and_lengths_are_exact(task: str, length: int, seed: int) -> None:
    for example in islice(WORLDS[task](length, seed), 2):
        tokens = example.tokens
        assert tokens.shape == (length,) and tokens.dtype == torch.int64
        assert tokens[0] == BOS and bool((tokens[1:] < 256).all())
        assert example.answers
        for a in example.answers:
            assert 0 < a.evidence_start < a.evidence_stop <= a.start < a.stop <= length
            assert torch.equal(tokens[a.start : a.stop], tokens[a.evidence_start : a.evidence_stop])
        assert max(a.stop for a in example.answers) == length


@pytest.mark.parametrize("task", [*WORLDS.values(), text])
def test_a_seed_names_one_stream(task) -> None:
    first, again, other = ([e.tokens for e in islice(task(300, seed), 4)] for seed in (7, 7, 8))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert not torch.equal(first[0], first[1])


def test_the_tasks_of_one_seed_do_not_share_their_randomness() -> None:
    def values(task) -> list[str]:
        return [decode(e.tokens[a.start : a.stop]) for e in islice(task(600, 0), 3) for a in e.answers]

    assert values(recall)[:3] != values(lookup)[:3]


@given(pairs=st.integers(1, 80), seed=st.integers(0, 10_000))
@settings(max_examples=50, deadline=None)
def test_recall_asks_every_key_once_and_a_key_stands_nowhere_else(pairs: int, seed: int) -> None:
    example = next(recall(1100, seed, pairs=pairs))
    page = decode(example.tokens)
    # In the page, without BOS, what token a.start says stands at a.start - 1.
    asked = [page[a.start - 3 : a.start - 1] for a in example.answers]
    assert len(set(asked)) == pairs == len(asked) and set(asked) <= set(KEYS)
    for a, key in zip(example.answers, asked, strict=True):
        assert page.count(key) == 2
        assert page[a.evidence_start - 3 : a.evidence_start - 1] == key
        assert page[a.start - 4 : a.start - 1] == f"?{key}"


def test_recall_asks_in_another_order() -> None:
    evidence = [a.evidence_start for a in next(recall(1100, 0, pairs=40)).answers]
    assert evidence != sorted(evidence)


def test_recall_can_ask_fewer_than_all() -> None:
    assert len(next(recall(256, 0, pairs=10, queries=3)).answers) == 3


def test_recall_asks_none_again_before_all_were_asked() -> None:
    evidence = [a.evidence_start for a in next(recall(256, 0, pairs=5, queries=13)).answers]
    for asked in (evidence[:5], evidence[5:10], evidence[10:]):
        assert len(set(asked)) == len(asked)
    assert len(set(evidence)) == 5


def test_copy_can_be_asked_several_times() -> None:
    example = next(copy(300, 0, size=9, times=4))
    assert len(example.answers) == 4 and len({a.evidence_start for a in example.answers}) == 1


@given(depth=st.floats(0, 1), seed=st.integers(0, 10_000))
@settings(max_examples=50, deadline=None)
def test_a_needle_lies_at_its_depth(depth: float, seed: int) -> None:
    example = next(needle(1000, seed, haystack=PROSE, depth=depth))
    (a,) = example.answers
    page = decode(example.tokens)
    said, asked = "\nThe pass key of qx is ", "\nThe pass key of qx is 0000"
    filler = 999 - len(said) - len("0000.\n") - len(asked)
    assert page.index("\nThe pass key of ") == round(depth * filler)
    assert a.evidence_start - 1 == round(depth * filler) + len(said)


def test_several_needles_are_all_asked_and_all_different() -> None:
    example = next(needle(1000, 3, haystack=PROSE, needles=5, digits=6))
    page = decode(example.tokens)
    names = [page[a.start - 1 - len("qx is ") : a.start - 1 - len(" is ")] for a in example.answers]
    assert len(set(names)) == 5
    for name, a in zip(names, example.answers, strict=True):
        assert a.stop - a.start == 6
        assert page.count(f"pass key of {name} is {decode(example.tokens[a.start : a.stop])}.") >= 1


@pytest.mark.parametrize(("depth", "index"), [(0.0, 0), (0.5, 10), (1.0, 20)])
def test_lookup_asks_the_pair_at_its_depth(depth: float, index: int) -> None:
    example = next(lookup(512, 5, pairs=21, depth=depth))
    (a,) = example.answers
    page = decode(example.tokens)
    assert page[: a.evidence_start - 1].count(";") == index


@pytest.mark.parametrize("depth", [0.0, 1.0])
def test_copy_says_its_string_twice(depth: float) -> None:
    example = next(copy(500, 2, haystack=PROSE, depth=depth, size=40))
    (a,) = example.answers
    said = decode(example.tokens[a.start : a.stop])
    assert len(said) == 40 and decode(example.tokens).count(f"\nCopy: {said}") == 2


@given(depth=st.floats(0, 1), seed=st.integers(0, 100), length=st.integers(280, 2000))
@settings(max_examples=30, deadline=None)
def test_a_pass_key_lies_at_its_depth_among_what_is_said_over_and_over(depth: float, seed: int, length: int) -> None:
    example = next(passkey(length, seed, depth=depth))
    (a,) = example.answers
    page = decode(example.tokens)
    key = decode(example.tokens[a.start : a.stop])
    assert page.count(key) == 3 and page.endswith(f"What is the pass key? The pass key is {key}")
    said = f"The pass key is {key}. Remember it. {key} is the pass key.\n"
    before, after = page.split(said)
    _, body = before.split("there.\n")
    rest = body + after.removesuffix(f"What is the pass key? The pass key is {key}")
    assert abs(len(body) - depth * len(rest)) <= 0.5 + 1e-9
    assert (
        "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n" * 30
    ).startswith(rest)


@given(hops=st.integers(1, 5), chains=st.integers(1, 4), seed=st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_a_tracked_variable_leads_back_to_its_value(hops: int, chains: int, seed: int) -> None:
    example = next(tracking(1500, seed, hops=hops, chains=chains, haystack=PROSE))
    *lines, (asked, value) = re.findall(r"VAR (\w+) = (\w+)", decode(example.tokens))
    known = dict(lines)
    assert len(known) == len(lines) == chains * (hops + 1)
    seen, steps = asked, 0
    for name, said in lines:  # every name is explained by one before it
        assert said.isdigit() or said in dict(lines[: lines.index((name, said))])
    while not seen.isdigit():
        seen, steps = known[seen], steps + 1
    assert seen == value and steps == hops + 1
    (a,) = example.answers
    assert decode(example.tokens[a.evidence_start - 1 - len("VAR ab = ") + 1 : a.evidence_start]).endswith(" = ")


@given(length=st.integers(60, 2000), seed=st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_one_word_stands_more_often_than_all_others(length: int, seed: int) -> None:
    page = decode(next(aggregation(length, seed)).tokens)
    words, answer = page.split("\nMost often: ")
    (first, often), (_, next_often) = Counter(words.split()).most_common(2)
    assert first == answer and next_often == 1 and often == max(2, len(words.split()) // 10)
    with pytest.raises(ValueError, match="times to be 1 to"):
        next(aggregation(length, seed, times=1000))


def test_prose_around_a_needle_is_the_haystack_given() -> None:
    page = decode(next(needle(800, 1, haystack=b"z" * 1000, needles=1)).tokens)
    assert page.count("z") >= 700 - len("The pass key of zz is ")


def test_shortest_lengths_work_and_one_less_is_refused() -> None:
    for task, shortest, options in (
        (needle, 1 + 2 * 27 + 2, {}),
        (recall, 1 + 2 * 5 * 3, {"pairs": 3}),
        (lookup, 1 + 5 * 4, {"pairs": 3}),
        (copy, 1 + 2 * (7 + 5) + 2, {"size": 5}),
    ):
        example = next(task(shortest, 0, **options))
        assert len(example.tokens) == shortest
        with pytest.raises(ValueError, match=rf"expected length >= {shortest} .* got {shortest - 1}"):
            next(task(shortest - 1, 0, **options))


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: needle(256, 0, depth=1.5), "expected depth between 0 and 1, got 1.5"),
        (lambda: needle(512, 0, depth=0.5, needles=2), "expected one needle with depth=0.5, got 2"),
        (lambda: needle(256, 0, needles=0), "expected needles to be 1 to 676, got 0"),
        (lambda: needle(256, 0, haystack=b"short"), "expected a text of at least"),
        (lambda: recall(9000, 0, pairs=677), "expected pairs to be 1 to 676, got 677"),
        (lambda: recall(256, 0, pairs=3, queries=0), "expected queries to be at least 1, got 0"),
        (lambda: copy(256, 0, times=0), "expected times to be at least 1, got 0"),
        (lambda: copy(256, 0, size=0), "expected size to be at least 1, got 0"),
        (lambda: text(1, 0), "expected length >= 2"),
    ],
)
def test_what_cannot_be_made_is_refused_with_the_reason(make, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        next(make())


@given(length=st.integers(2, 4000), seed=st.integers())
@settings(max_examples=50, deadline=None)
def test_text_is_a_window_of_the_heldout_prose(length: int, seed: int) -> None:
    example = next(text(length, seed))
    assert example.tokens.shape == (length,) and example.answers == ()
    assert decode(example.tokens).encode() in heldout()


def test_rows_are_drawn_together_and_by_the_seed() -> None:
    numbers = torch.arange(50)
    first, again, other = (list(islice(drawn((numbers, numbers.float() ** 2), 8, seed), 3)) for seed in (1, 1, 2))
    for (x, y), (same, _) in zip(first, again, strict=True):
        assert x.shape == (8,) and torch.equal(x.float() ** 2, y) and torch.equal(x, same)
    assert not torch.equal(first[0][0], first[1][0]) and not torch.equal(first[0][0], other[0][0])


def test_heldout_is_plain_prose_with_its_licence() -> None:
    assert 200_000 <= len(heldout()) <= 256_000
    assert heldout().isascii()
    assert heldout().count(b" the ") > 1000


def test_encode_and_decode_are_inverse() -> None:
    page = "caf\u00e9 AB37;"
    assert decode(encode(page.encode())) == page
