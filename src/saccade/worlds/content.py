"""Sequences that ask for content by its position, for positions that content tells, and for an order.

V values are tokens 0 .. V - 1; then come the positions, of which V + p means "place p"; then the words below.

    position   v v v v v v v v  p  q  r            what stands at p, at q, at r?
    jump       v v GO p v v v v ... ASK v v v      the values from the place p that GO tells, wherever GO stands
    sort       v v v v v v v v  SORT v v v v ...   all values in rising order; equal ones from the left

Inputs hold the answers before the one that is asked (teacher forcing). Every label has its evidence: the place at
which that very token stands.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from .batches import Labelled, batch, expect, labelled

__all__ = ["batch", "jump", "position", "sort", "vocabulary"]


def vocabulary(length: int, values: int) -> int:
    """How many tokens there are: values, a position for every place, and three words."""
    return values + length + 3


def _word(name: str, length: int, values: int) -> int:
    return values + length + ("go", "ask", "sort").index(name)


def position(length: int, seed: int | str, *, values: int = 32, queries: int = 8) -> Iterator[Labelled]:
    """Endless sequences of ``length`` tokens, the last ``queries`` of them different positions, labelled there."""
    expect("position", "values", values, 2)
    expect("position", "queries", queries, 1, length // 2)
    rng = random.Random(f"position/{seed}")
    while True:
        said = rng.choices(range(values), k=length - queries)
        places = rng.sample(range(len(said)), queries)
        asked = {len(said) + i: (said[place], place) for i, place in enumerate(places)}
        yield labelled(said + [values + place for place in places], asked)


def jump(length: int, seed: int | str, *, values: int = 32, span: int = 4) -> Iterator[Labelled]:
    """Endless sequences of ``length`` tokens; the last ``span`` places are asked, the first of them being ASK.

    GO and its position stand anywhere but in the span that is copied.
    """
    expect("jump", "values", values, 2)
    expect("jump", "span", span, 1, (length - 2) // 2)
    rng = random.Random(f"jump/{seed}")
    while True:
        said = rng.choices(range(values), k=length - span)
        to = rng.randrange(len(said) - span - 1)  # among the places that are left without GO and its position
        go = rng.choice([*range(to + 1), *range(to + span, len(said) - 1)])
        if go <= to:
            to += 2
        said[go : go + 2] = [_word("go", length, values), values + to]
        copied = said[to : to + span]
        asked = {len(said) + i: (token, to + i) for i, token in enumerate(copied)}
        yield labelled([*said, _word("ask", length, values), *copied[:-1]], asked)


def sort(length: int, seed: int | str, *, values: int = 32) -> Iterator[Labelled]:
    """Endless sequences of ``length`` tokens (even): as many values as labels, the first of these at SORT."""
    expect("sort", "values", values, 2)
    expect("sort", "length", length, 2)
    if length % 2:
        raise ValueError(f"sort: expected an even length, got {length}: ask for {length + 1}")
    rng = random.Random(f"sort/{seed}")
    while True:
        said = rng.choices(range(values), k=length // 2)
        order = sorted(range(len(said)), key=said.__getitem__)
        asked = {len(said) + i: (said[place], place) for i, place in enumerate(order)}
        yield labelled([*said, _word("sort", length, values), *(said[place] for place in order[:-1])], asked)
