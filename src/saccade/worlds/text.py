"""Held-out English prose as a world, and what every sequence world yields: an Example with its Answers."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

BOS = 256
"""The token every example begins with; 0 to 255 are bytes."""


@dataclass(frozen=True)
class Answer:
    """tokens[start:stop] must be predicted; it already stands at tokens[evidence_start:evidence_stop]."""

    start: int
    stop: int
    evidence_start: int
    evidence_stop: int


@dataclass(frozen=True, eq=False)
class Example:
    """tokens: int64 [N], BOS then bytes. answers: in the order in which they are asked."""

    tokens: Tensor
    answers: tuple[Answer, ...] = ()


@cache
def heldout() -> bytes:
    """The shipped sample of prose (ASCII) that no checkpoint of the zoo was trained on."""
    return (Path(__file__).parent / "data" / "heldout.txt").read_bytes()


@cache
def manual() -> bytes:
    """Python's reference manual as the interpreter carries it (ASCII): the embedded models read the like."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics.values()).encode("ascii", errors="ignore")


def encode(page: bytes | bytearray) -> Tensor:
    """Bytes to tokens: int64 [1 + len(page)], BOS first."""
    return torch.tensor([BOS, *page], dtype=torch.int64)


def decode(tokens: Tensor) -> str:
    """Tokens [N] to text; BOS and other special tokens are left out."""
    return bytes(t for t in tokens.tolist() if t < BOS).decode("utf-8", errors="replace")


def window(source: bytes, size: int, rng: random.Random) -> bytes:
    """`size` consecutive bytes of source, from a random place."""
    if size > len(source):
        raise ValueError(
            f"expected a text of at least {size} bytes, got {len(source)}: "
            "give a longer haystack= (or source=), or ask for a shorter length"
        )
    start = rng.randint(0, len(source) - size)
    return source[start : start + size]


def text(length: int, seed: int | str, *, source: bytes | None = None) -> Iterator[Example]:
    """Endless windows of `source` (the held-out prose by default); tokens [length], no answers."""
    if length < 2:
        raise ValueError(f"text: expected length >= 2 (BOS and one byte), got {length}: ask for a longer one")
    rng = random.Random(f"text/{seed}")
    source = heldout() if source is None else source
    while True:
        yield Example(encode(window(source, length - 1, rng)))
