"""Policies: one function that scores the tokens a cache holds. The best are kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..core.stats import KeyMass, Stat


@dataclass(frozen=True)
class Look:
    """What a policy sees of some key heads of a layer after its attention ran.

    Attributes:
        seen: results of the policy's stats, for the query heads of these key heads.
        keys, values: what is held, ``[B, Hkv, M, D]``.
        positions: logical positions of the tokens, ``[B, Hkv, M]``; -1 where there is none (padding).
        scores: what the policy last said of each token, ``[B, Hkv, M]``; 0 for new ones.
        new: how many of the last tokens came with this call.
        total: tokens that the layer has seen.
        layer: its number.
    """

    seen: dict[str, Any]
    keys: Tensor
    values: Tensor
    positions: Tensor
    scores: Tensor
    new: int
    total: int
    layer: int

    def last(self, count: int) -> Tensor:
        """Which tokens are among the last ``count`` seen: bool ``[B, Hkv, M]``."""
        return self.positions >= self.total - count

    def by_key_head(self, x: Tensor) -> Tensor:
        """Sum over the query heads that share a key head: ``[B, H, ...]`` to ``[B, Hkv, ...]``."""
        return x.unflatten(1, (self.keys.shape[1], -1)).sum(2)


class Policy:
    """Base of all policies: :meth:`score`, and what it wants to see."""

    shared = False  # do the heads of a layer compete for one budget?
    while_decoding = True  # are tokens dropped after single steps too, or only after the prompt and its chunks?

    def stats(self, queries: int) -> Sequence[Stat]:
        """What the engine should look at in a call with this many queries."""
        return ()

    def score(self, look: Look) -> Tensor:
        """The worth of each held token, ``[B, Hkv, M]``: of a head's tokens the greatest are kept."""
        raise NotImplementedError

    def stays(self, look: Look) -> Tensor | None:
        """Tokens that are kept whatever they score: bool ``[B, Hkv, M]``."""
        return None


class All(Policy):
    """Everything is worth as much: what a cache without a budget uses."""

    def score(self, look: Look) -> Tensor:
        return look.scores


class Recent(Policy):
    """The first tokens and the last (StreamingLLM, arXiv:2309.17453).

    Args:
        sinks: how many of the first are kept.
    """

    def __init__(self, sinks: int = 4):
        self.sinks = sinks

    def score(self, look: Look) -> Tensor:
        return look.positions.to(look.scores.dtype)

    def stays(self, look: Look) -> Tensor:
        return look.positions < self.sinks


class KeyNorm(Policy):
    """Keys of small norm (arXiv:2406.11430)."""

    def score(self, look: Look) -> Tensor:
        return -look.keys.to(look.scores.dtype).norm(dim=-1)


class H2O(Policy):
    """Keys that gathered most attention since they came (arXiv:2306.14048); the last ``recent`` always stay."""

    def __init__(self, recent: int = 32):
        self.recent = recent

    def stats(self, queries: int) -> Sequence[Stat]:
        return (KeyMass(),)

    def score(self, look: Look) -> Tensor:
        return look.scores + look.by_key_head(look.seen["key_mass"])

    def stays(self, look: Look) -> Tensor:
        return look.last(self.recent)
