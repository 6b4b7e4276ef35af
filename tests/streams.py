"""What every generated world promises about its seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields
from itertools import islice
from typing import Any

import torch


def assert_streams(make: Callable[[int], Iterator[Any]]) -> None:
    """The same seed gives the same examples, another one others, and no example is the one before."""

    def same(a: Any, b: Any) -> bool:
        return all(torch.equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))

    first, again, other = (list(islice(make(seed), 4)) for seed in (7, 7, 8))
    assert all(map(same, first, again))
    assert not all(map(same, first, other)) and not all(map(same, first[:-1], first[1:]))
