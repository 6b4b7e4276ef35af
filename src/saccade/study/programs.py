"""The programs a study can name: plain baselines, and every training-free system of the catalogue.

The baselines are not published systems: they are the simplest member of each way to look at less, and two controls
(`random`, `uniform`) that a method must beat to mean anything. Inside a model its own causal mask is added to
theirs, so they do not repeat it.
"""

from __future__ import annotations

import difflib
import hashlib
import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core import masks, normalizers, selectors
from ..core.errors import SpecError
from ..core.spec import Attention


@dataclass(frozen=True)
class Entry:
    """A named program: ``build(heads)`` makes it, ``settings`` tells it from others of the same name."""

    name: str
    title: str
    build: Callable[[int], Attention]
    code: str  # hash of the source that defines it

    def settings(self, heads: int) -> str:
        """The program as text, with everything that was chosen."""
        return re.sub(r" at 0x[0-9a-f]+", "", repr(self.build(heads)))  # where an object lies is no setting


def scattered(h: Tensor, q: Tensor, k: Tensor, share: float = 0.125) -> Tensor:
    """A fixed pseudo-random choice of ``share`` of all (head, query, key) places."""
    mixed = (q * 73856093) ^ (k * 19349663) ^ (h * 83492791)
    mixed = (mixed ^ (mixed >> 13)) * 1274126177
    return (mixed >> 7) % 1024 < int(share * 1024)


def _level(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return torch.zeros_like(score)


def _random(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return scattered(h, q, k)


BASELINES: dict[str, tuple[str, Callable[[], Attention]]] = {
    "dense": ("softmax over every key: what all others are measured against", Attention),
    "window": ("the last 256 keys", lambda: Attention(mask=masks.Window(256))),
    "window-sinks": (
        "the last 252 keys and the first 4",
        lambda: Attention(mask=masks.Window(252) | masks.Sinks(4)),
    ),
    "dilated": (
        "the last 64 keys, then every 8th of the last 1536",
        lambda: Attention(mask=masks.Window(64) | masks.Dilated(192, 8)),
    ),
    "blocks": ("the own block of 256 keys", lambda: Attention(mask=masks.Blocks(256))),
    "topk": (
        "each query's 32 best keys, found among all of them",
        lambda: Attention(normalizer=normalizers.TopKSoftmax(32)),
    ),
    "block-topk": (
        "per 64 queries the 4 blocks of 64 keys with the best mean, the own and the first among them",
        lambda: Attention(select=selectors.TopKBlocks(4, block=64, local=1, first=1)),
    ),
    "token-topk": (
        "per query the 16 blocks of 16 keys with the best mean, the own and the first among them",
        lambda: Attention(select=selectors.TopKBlocks(16, block=16, rows=1, local=2, first=1)),
    ),
    "entmax": ("1.5-entmax in place of softmax: exact zeros", lambda: Attention(normalizer=normalizers.Entmax(1.5))),
    "random": (
        "the last 64 keys and a random eighth of the others: a control",
        lambda: Attention(mask=masks.Window(64) | _random),
    ),
    "uniform": ("the mean of all values, whatever the scores: a control", lambda: Attention(score=_level)),
}
DEFAULT = ("dense", "window", "window-sinks", "dilated", "blocks", "topk", "block-topk", "random")


def names() -> list[str]:
    """Every name that :func:`find` knows: the baselines, then the catalogue's training-free systems."""
    from .. import catalog

    found = [slug for slug, system in catalog.systems().items() if system.promises.training_free]
    return [*BASELINES, *sorted(set(found) - set(BASELINES))]


def find(name: str) -> Entry:
    """A program by name.

    Raises:
        SpecError: no such name (the nearest is suggested), or a system that has to be trained first.
    """
    if name in BASELINES:
        title, make = BASELINES[name]
        return Entry(name, title, lambda heads: make(), _hash(inspect.getsource(inspect.getmodule(find))))  # type: ignore[arg-type]
    from .. import catalog

    system = catalog.systems().get(name)
    if system is None:
        near = difflib.get_close_matches(name, names(), 1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(names())}"
        raise SpecError(f"unknown system {name!r}: {hint}")
    if not system.promises.training_free:
        raise SpecError(f"system {name!r} has to be trained first, so it cannot be put into a finished model")
    module = inspect.getmodule(system)
    assert module is not None
    return Entry(name, system.title, lambda heads: system().build(heads), _hash(inspect.getsource(module)))


def resolve(wanted: Sequence[str]) -> list[Entry]:
    """Entries for names, ``dense`` first (it is what the others are measured against), each once."""
    return [find(name) for name in dict.fromkeys(["dense", *wanted])]


def _hash(source: str) -> str:
    return hashlib.sha256(source.encode()).hexdigest()[:12]
