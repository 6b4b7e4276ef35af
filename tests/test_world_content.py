"""Content by position: readers that see only the inputs give every label and the place where it stands."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade.worlds.batches import IGNORED, Labelled, batch
from saccade.worlds.content import jump, position, sort, vocabulary
from streams import assert_streams


def asked(example: Labelled, values: int) -> tuple[list[int], list[int], list[int], list[int]]:
    """Inputs, and of every place that asks: itself, its label and its evidence (which must say the same)."""
    inputs, labels, evidence = (column.tolist() for column in (example.inputs, example.labels, example.evidence))
    assert example.inputs.dtype == torch.int64 and all(0 <= t < vocabulary(len(inputs), values) for t in inputs)
    places = [i for i, label in enumerate(labels) if label != IGNORED]
    assert places == [i for i, stands in enumerate(evidence) if stands != IGNORED]
    assert places == list(range(places[0], len(inputs)))
    found = [evidence[i] for i in places]
    assert all(
        inputs[stands] == labels[i] < values and stands < places[0] for i, stands in zip(places, found, strict=True)
    )
    return inputs, places, [labels[i] for i in places], found


@given(length=st.integers(2, 60), values=st.integers(2, 40), seed=st.integers(0, 10**6), data=st.data())
@settings(max_examples=60, deadline=None)
def test_the_value_stands_where_the_position_says(length, values, seed, data) -> None:
    queries = data.draw(st.integers(1, length // 2))
    inputs, places, labels, evidence = asked(next(position(length, seed, values=values, queries=queries)), values)
    assert len(inputs) == length and len(places) == queries and max(inputs[: places[0]]) < values
    assert [inputs[i] - values for i in places] == evidence and len(set(evidence)) == queries
    assert labels == [inputs[inputs[i] - values] for i in places]


@given(length=st.integers(4, 60), values=st.integers(2, 40), seed=st.integers(0, 10**6), data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_jump_leads_to_what_is_copied(length, values, seed, data) -> None:
    span = data.draw(st.integers(1, (length - 2) // 2))
    inputs, places, labels, evidence = asked(next(jump(length, seed, values=values, span=span)), values)
    go, ask = values + length, values + length + 1
    assert len(inputs) == length and len(places) == span and inputs.count(go) == inputs.count(ask) == 1
    assert inputs[places[0]] == ask and inputs[places[0] + 1 :] == labels[:-1]
    start = inputs[inputs.index(go) + 1] - values
    assert evidence == list(range(start, start + span)) and labels == inputs[start : start + span]


def test_a_jump_goes_from_everywhere_to_everywhere() -> None:
    many = batch(jump(10, 0, span=2), 3000)
    starts, at = many.evidence[:, 8].tolist(), (many.inputs == 42).nonzero()[:, 1].tolist()
    assert set(Counter(zip(at, starts, strict=True))) == {
        (go, start) for go in range(7) for start in range(7) if not {go, go + 1} & {start, start + 1}
    }


@given(half=st.integers(1, 40), values=st.integers(2, 40), seed=st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_sorting_is_stable(half, values, seed) -> None:
    inputs, places, labels, evidence = asked(next(sort(2 * half, seed, values=values)), values)
    assert len(inputs) == 2 * half and places[0] == half and inputs[half] == values + 2 * half + 2
    assert labels == sorted(inputs[:half]) and inputs[half + 1 :] == labels[:-1]
    assert sorted(evidence) == list(range(half))
    assert all((labels[i], evidence[i]) < (labels[i + 1], evidence[i + 1]) for i in range(half - 1))


def test_one_seed_names_one_stream() -> None:
    for task in (position, jump, sort):
        assert_streams(lambda seed, task=task: task(20, seed))


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: position(10, 0, queries=6), "expected queries to be 1 to 5, got 6"),
        (lambda: jump(10, 0, span=5), "expected span to be 1 to 4, got 5"),
        (lambda: sort(11, 0), "expected an even length, got 11: ask for 12"),
        (lambda: sort(10, 0, values=1), "expected values to be at least 2, got 1"),
    ],
)
def test_what_cannot_be_made_is_refused_with_the_reason(make, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        next(make())
