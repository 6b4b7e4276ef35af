"""What a study can name: plain programs and caches, and every training-free system of the catalogue.

The plain ones are the simplest member of each way to look at or to hold less, and two controls (`random`,
`uniform`) that a method must beat to mean anything. Inside a model its own causal mask is added to theirs, so they
do not repeat it.
"""

from __future__ import annotations

import difflib
import hashlib
import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..cache import H2O, Cache, Policy, Recent
from ..core import masks, normalizers, selectors
from ..core.errors import SpecError
from ..core.spec import Attention
from ..hosts.handles import install, lead
from ..systems.base import CacheSystem, MethodSystem, StudySystem, System

HELD = 0.125  # share of the tokens that the caches of a study may hold


@dataclass(frozen=True)
class Entry:
    """A named way to run a model: a program (``build(heads)``), a cache's ``policy()`` or a ``method(model)``."""

    name: str
    title: str
    code: str  # hash of the source that defines it
    build: Callable[[int], Attention] | None = None
    policy: Callable[[], Policy] | None = None
    method: Callable[[Any], AbstractContextManager[Any]] | None = None
    chosen: str = ""

    def __reduce__(self) -> Any:
        return find, (self.name,)

    def settings(self, heads: int) -> str:
        """As text, with everything that was chosen."""
        if self.build is None:
            return self.chosen
        return re.sub(r" at 0x[0-9a-f]+", "", repr(self.build(heads)))  # where an object lies is no setting

    @contextmanager
    def inside(self, model: Any) -> Iterator[Callable[[], Any]]:
        """Let a model run this way; yields what makes a fresh cache for it (``None``: the model's own)."""
        if self.build is not None:
            build = self.build
            with install(model, lambda layer, heads: build(heads)):
                yield lambda: None
        elif self.method is not None:
            with self.method(model):
                yield lambda: None
        else:
            assert self.policy is not None
            policy = self.policy

            def fresh() -> Cache:
                cache = Cache(model, policy(), budget=HELD)
                cache.open = True  # the handle around it is this one's
                return cache

            with lead(model):
                yield fresh


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
CACHES: dict[str, tuple[str, Callable[[], Policy]]] = {
    "recent-cache": ("holds the last tokens and the first 4, an eighth of all", lambda: Recent(4)),
    "h2o-cache": ("holds an eighth of all tokens, those that gathered most attention", lambda: H2O(32)),
}
DEFAULT = ("dense", "window", "window-sinks", "dilated", "blocks", "topk", "block-topk", "recent-cache", "snapkv")


def names() -> list[str]:
    """Every name that :func:`find` knows: the baselines, then the catalogue's training-free systems."""
    from .. import catalog

    found = [slug for slug, system in catalog.systems().items() if _finished(system)]
    return [*BASELINES, *CACHES, *sorted(set(found) - set(BASELINES))]


def find(name: str) -> Entry:
    """A program by name.

    Raises:
        SpecError: no such name (the nearest is suggested), or a system that has to be trained first.
    """
    here = _hash(inspect.getsource(inspect.getmodule(find)))  # type: ignore[arg-type]
    if name in BASELINES:
        title, make = BASELINES[name]
        return Entry(name, title, here, build=lambda heads: make())
    if name in CACHES:
        title, policy = CACHES[name]
        return Entry(name, title, here, policy=policy, chosen=f"{policy().__dict__}, holds {HELD}")
    from .. import catalog

    system = catalog.systems().get(name)
    if system is None:
        near = difflib.get_close_matches(name, names(), 1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(names())}"
        raise SpecError(f"unknown system {name!r}: {hint}")
    if issubclass(system, StudySystem):
        raise SpecError(f"{name!r} is a study of many systems: saccade study {name}")
    if not _finished(system):
        raise SpecError(f"system {name!r} has to be trained first, so it cannot be put into a finished model")
    module = inspect.getmodule(system)
    assert module is not None
    code, one = _hash(inspect.getsource(module)), system()
    if isinstance(one, CacheSystem):
        return Entry(name, system.title, code, policy=one.policy, chosen=f"{one!r}, holds {HELD}")
    if isinstance(one, MethodSystem):
        return Entry(name, system.title, code, method=one.apply, chosen=repr(one))
    return Entry(name, system.title, code, build=lambda heads: system().build(heads))


def _finished(system: type[System]) -> bool:
    """Can it be put into a finished model as it is?"""
    return system.promises.training_free and not issubclass(system, StudySystem)


def resolve(wanted: Sequence[str]) -> list[Entry]:
    """Entries for names, ``dense`` first (it is what the others are measured against), each once."""
    return [find(name) for name in dict.fromkeys(["dense", *wanted])]


def _hash(source: str) -> str:
    return hashlib.sha256(source.encode()).hexdigest()[:12]
