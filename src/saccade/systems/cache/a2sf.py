"""A2SF: accumulated attention with forgetting, so that old keys do not win by having been there longer.

    score[k] = sum over queries t of  factor ** (T - t) * weight[t, k]          T: the newest query
    kept     = the last `recent` tokens, and of the others those with the greatest scores

A plain sum (factor 1, H2O) favours old keys: under a causal mask they were looked at by more queries.

Paper: A2SF: Accumulative Attention Scoring with Forgetting Factor for Token Pruning in Transformer Decoder,
    arXiv:2407.20485
Code: https://github.com/Dirac-Notation/A2SF (utils_real_drop/policies/a2sf.py and base.py: recent 16)

Differs: the official code scores the prompt alone; here a token that is generated votes too, as in the paper. The
query heads of a group add their votes. The code has no default factor (it searches one for each task); the paper's
range is 0.1 to 0.9 for decoding, and here 0.99 is the default, about a hundred queries of memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...cache import Look, Policy
from ...core.errors import SpecError
from ...core.stats import Stat
from ...core.tile import Tile
from ..base import CacheSystem, ClaimNumbers


class A2SF(CacheSystem):
    """Settings: ``factor`` of forgetting, per query; ``recent`` tokens that always stay."""

    slug = "a2sf"
    title = "A2SF"
    paper = "https://arxiv.org/abs/2407.20485"
    code = "https://github.com/Dirac-Notation/A2SF"

    def __init__(self, factor: float = 0.99, recent: int = 16):
        if not 0 < factor <= 1 or recent < 0:
            raise SpecError(f"A2SF: expected 0 < factor <= 1 and recent >= 0; got factor={factor}, recent={recent}")
        self.factor, self.recent = factor, recent

    def policy(self) -> Policy:
        """Accumulated attention with forgetting."""
        return Forgetting(self)

    def quarter(self, length: int) -> tuple[Policy, int]:
        """The policy with a budget of a quarter of the length."""
        return self.policy(), length // 4

    def claim(self) -> ClaimNumbers:
        """At the same budget: how old the kept tokens are, and needles answered, beside plain accumulation."""
        from ...study.caching import ages, needles

        both = {"forgetting": self, "plain": A2SF(1.0, self.recent)}
        age = {name: ages(system.policy) for name, system in both.items()}
        answered = {name: needles(system.quarter)["kept"] for name, system in both.items()}
        return ClaimNumbers.decide(
            {f"age_{n}": round(a, 4) for n, a in age.items()} | {f"needle_{n}": a for n, a in answered.items()},
            f"Kept tokens lie at {age['forgetting']:.2f} of the text on average (plain accumulation:"
            f" {age['plain']:.2f}; even: 0.50); needles answered with a quarter of the cache:"
            f" {answered['forgetting']:.0%} (plain: {answered['plain']:.0%}).",
            fairer=abs(age["forgetting"] - 0.5) < abs(age["plain"] - 0.5),
            more_accurate=answered["forgetting"] > answered["plain"],
        )


class FadingMass(Stat):
    """Mass each key receives, a query's share faded by ``factor`` for each query after it, ``[B, H, M]``."""

    axis = "keys"

    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def see(self, tile: Tile) -> tuple[Tensor, ...]:
        """Sum over the tile's queries."""
        after = (tile.at.n - 1 - tile.at.q).to(tile.weights.dtype)
        return ((tile.weights * self.factor**after).sum(2),)


class Forgetting(Policy):
    """The policy of :class:`A2SF`."""

    def __init__(self, setting: A2SF):
        self.setting = setting

    def stats(self, queries: int) -> Sequence[Stat]:
        """Faded mass of this call's queries."""
        return (FadingMass(self.setting.factor),)

    def score(self, look: Look) -> Tensor:
        """What was there fades by as many queries as came."""
        return look.scores * self.setting.factor**look.new + look.by_key_head(look.seen["fading_mass"])

    def stays(self, look: Look) -> Tensor:
        """The last tokens."""
        return look.last(self.setting.recent) & torch.ones_like(look.positions, dtype=torch.bool)
