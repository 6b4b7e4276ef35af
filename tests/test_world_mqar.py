"""MQAR: Zoology's definition read anew, its law of gaps by enumeration; and batches of any world."""

from __future__ import annotations

import random
from collections import Counter
from itertools import islice, permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade.worlds.batches import IGNORED, batch
from saccade.worlds.mqar import mqar, without_replacement
from streams import assert_streams


@given(pairs=st.integers(1, 16), extra=st.integers(0, 40), seed=st.integers(0, 10**6), filled=st.booleans())
@settings(max_examples=60, deadline=None)
def test_every_key_is_asked_once_and_its_value_stands_behind_it(pairs, extra, seed, filled) -> None:
    length = 4 * pairs + 2 * extra
    vocab = 2 * length + seed % 2
    stream = mqar(length, seed, vocab_size=vocab, num_kv_pairs=pairs, random_non_queries=filled)
    for example in islice(stream, 3):
        inputs, labels = example.inputs.tolist(), example.labels.tolist()
        assert example.inputs.dtype == example.labels.dtype == torch.int64 and len(inputs) == len(labels) == length
        known = dict(zip(inputs[0 : 2 * pairs : 2], inputs[1 : 2 * pairs : 2], strict=True))
        assert len(known) == len(set(known.values())) == pairs
        assert all(1 <= key < vocab // 2 <= value < vocab for key, value in known.items())
        asked = [i for i, label in enumerate(labels) if label != IGNORED]
        assert sorted(inputs[i] for i in asked) == sorted(known)
        for i in asked:
            assert i >= 2 * pairs and i % 2 == 0 and labels[i] == known[inputs[i]]
            stands = int(example.evidence[i])
            assert inputs[stands] == labels[i] and inputs[stands - 1] == inputs[i] and stands < 2 * pairs
        assert [i for i, place in enumerate(example.evidence.tolist()) if place != IGNORED] == asked
        if not filled:
            assert not any(inputs[i] for i in range(2 * pairs, length) if i not in asked)


def test_the_gaps_follow_the_power_law_without_replacement() -> None:
    law = [0.5 * gap**-0.5 for gap in range(1, 5)]
    rng, draws = random.Random(0), 20_000
    seen = Counter(tuple(without_replacement(law, 2, rng)) for _ in range(draws))
    total = sum(law)
    square = 0.0
    for i, j in permutations(range(4), 2):
        share = draws * law[i] / total * law[j] / (total - law[i])
        square += (seen[i, j] - share) ** 2 / share
    assert square < 31.3  # chi-square with 11 degrees of freedom, one in a thousand

    first = Counter(int((e.labels != IGNORED).nonzero()[0, 0]) for e in islice(mqar(10, 0, num_kv_pairs=1), 4000))
    law = [gap**-0.99 for gap in range(1, 5)]
    for gap, weight in enumerate(law):
        share = weight / sum(law)
        assert abs(first[2 + 2 * gap] / 4000 - share) < 4 * (share * (1 - share) / 4000) ** 0.5


def test_one_seed_names_one_stream() -> None:
    assert_streams(lambda seed: mqar(64, seed))


def test_a_batch_stacks_what_the_stream_gives_next() -> None:
    stream, alone = mqar(32, 3, num_kv_pairs=2), mqar(32, 3, num_kv_pairs=2)
    next(stream), next(alone)
    many = batch(stream, 5)
    assert many.inputs.shape == many.labels.shape == many.evidence.shape == (5, 32)
    for inputs, labels, example in zip(many.inputs, many.labels, alone, strict=False):
        assert torch.equal(inputs, example.inputs) and torch.equal(labels, example.labels)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: mqar(64, 0, num_kv_pairs=17), "expected num_kv_pairs to be 1 to 16, got 17"),
        (lambda: mqar(64, 0, vocab_size=64), "expected vocab_size to be at least 65, got 64"),
        (lambda: mqar(65, 0), "expected an even length, got 65"),
        (lambda: iter([batch(mqar(64, 0), 0)]), "expected size to be at least 1, got 0"),
        (lambda: iter([batch(islice(mqar(64, 0), 2), 3)]), "expected 3 examples, got 2"),
    ],
)
def test_what_cannot_be_made_is_refused_with_the_reason(make, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        next(make())
