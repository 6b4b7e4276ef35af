"""What worlds share: examples as one batch, batches of what is held, labelled sequences, settings checked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from itertools import islice
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

E = TypeVar("E", bound="DataclassInstance")

IGNORED = -100
"""No label here: what torch's cross-entropy leaves out."""

UNLABELLED = {"pad": IGNORED}
"""Metadata of a field that :func:`batch` fills up with IGNORED, and not with 0."""


def batch(stream: Iterator[E], size: int) -> E:
    """The next ``size`` examples as one: every tensor with a batch dimension in front, padded at its ends."""
    expect("batch", "size", size, 1)
    rows = list(islice(stream, size))
    if len(rows) < size:
        raise ValueError(f"batch: expected {size} examples, got {len(rows)}: hand over an endless stream")
    columns = {
        f.name: _stack([getattr(row, f.name) for row in rows], f.metadata.get("pad", 0)) for f in fields(rows[0])
    }
    return type(rows[0])(**columns)


def _stack(rows: list[Tensor], pad: int) -> Tensor:
    room = [max(sizes) for sizes in zip(*(row.shape for row in rows), strict=True)]
    stacked = rows[0].new_full((len(rows), *room), pad)
    for into, row in zip(stacked, rows, strict=True):
        into[tuple(slice(n) for n in row.shape)] = row
    return stacked


def drawn(columns: Sequence[Tensor], size: int, seed: int) -> Iterator[tuple[Tensor, ...]]:
    """Endless batches of ``size`` rows of tensors that are held, ``[S, ...]`` each, drawn with replacement."""
    source = torch.Generator().manual_seed(seed)
    while True:
        some = torch.randint(len(columns[0]), (size,), generator=source)
        yield tuple(column[some] for column in columns)


def expect(world: str, name: str, value: float, least: float, most: float | None = None) -> None:
    """Raise ValueError unless least <= value <= most."""
    if value < least or (most is not None and value > most):
        bound = f"at least {least}" if most is None else f"{least} to {most}"
        raise ValueError(f"{world}: expected {name} to be {bound}, got {value}: choose {name}= in that range")


@dataclass(frozen=True, eq=False)
class Labelled:
    """A sequence of which some places ask; int64 [N] each, IGNORED at all other places.

    labels: what must be predicted at this place. evidence: where that very token stands.
    """

    inputs: Tensor
    labels: Tensor = field(metadata=UNLABELLED)
    evidence: Tensor = field(metadata=UNLABELLED)


def labelled(inputs: list[int], asked: dict[int, tuple[int, int]]) -> Labelled:
    """``asked``: by place, the token that must be predicted there and the place of its evidence."""
    nothing = (IGNORED, IGNORED)
    labels, evidence = zip(*(asked.get(place, nothing) for place in range(len(inputs))), strict=True)
    return Labelled(torch.tensor(inputs), torch.tensor(labels), torch.tensor(evidence))
