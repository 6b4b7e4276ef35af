"""Policies: one function that scores the tokens a cache holds. The best are kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.errors import SpecError
from ..core.stats import KeyMass, Rows, Stat


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

    def by_key_head(self, x: Tensor) -> Tensor:
        """Sum over the query heads that share a key head: ``[B, H, ...]`` to ``[B, Hkv, ...]``."""
        return x.unflatten(1, (self.keys.shape[1], -1)).sum(2)


class Policy:
    """Base of all policies: :meth:`score`, and what it wants to see."""

    shared = False  # do the heads of a layer compete for one budget?

    def stats(self, queries: int) -> Sequence[Stat]:
        """What the engine should look at in a call with this many queries."""
        return ()

    def score(self, look: Look) -> Tensor:
        """The worth of each held token, ``[B, Hkv, M]``: of a head's tokens the greatest are kept."""
        raise NotImplementedError


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
        position = look.positions.to(look.scores.dtype)
        return torch.where(position < self.sinks, torch.inf, position)


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
        mass = look.scores.masked_fill(look.scores.isinf(), 0) + look.by_key_head(look.seen["key_mass"])
        return torch.where(look.positions >= look.total - self.recent, torch.inf, mass)


class SnapKV(Policy):
    """What the last ``window`` queries of the prompt look at, pooled over neighbours (arXiv:2404.14469).

    The window itself always stays. Scores are made once, by the last chunk of several tokens; tokens that are
    generated later stay.

    Args:
        window: queries that vote.
        kernel: width of the pooling, odd.
        pooling: "avg" or "max".
    """

    def __init__(self, window: int = 32, kernel: int = 5, pooling: str = "avg"):
        if pooling not in ("avg", "max") or kernel % 2 == 0 or window < 1:
            raise SpecError(
                f"SnapKV: expected window >= 1, an odd kernel and pooling avg or max; got window={window},"
                f" kernel={kernel}, pooling={pooling!r}"
            )
        self.window, self.kernel, self.pooling = window, kernel, pooling

    def stats(self, queries: int) -> Sequence[Stat]:
        return (Rows(range(-min(self.window, queries), 0)),) if queries > 1 else ()

    def score(self, look: Look) -> Tensor:
        if look.new == 1:
            return torch.where(look.positions == look.total - 1, torch.inf, look.scores)
        votes = look.by_key_head(look.seen["rows"].sum(2))
        pool = F.avg_pool1d if self.pooling == "avg" else F.max_pool1d
        pooled = pool(votes, self.kernel, stride=1, padding=self.kernel // 2)
        return torch.where(look.positions >= look.total - self.window, torch.inf, pooled)
