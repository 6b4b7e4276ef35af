"""Preplan and anchor: attention tells which tokens of an answer to credit when a model learns from rewards.

Heads are local or global by the mean distance that they look back. With w the mean weights of the local or global ones:

    waad[t] = sum_k w[t, k] min(t - k, window)                            local heads: how far back a token looks
    fai[k] = mean of w[t, k] over the tokens t with near <= t - k <= far  global heads: how much later tokens look at it

Preplan tokens are those at which waad changes most, anchors those with the greatest fai (a share ``top`` of an answer).
A policy gradient credits them more: ``credit[t]`` is ``amplify`` there and 1 elsewhere. If coupled, an anchor that is
no preplan token itself hands half of what it gets above 1 to the preplan token before it:

    loss = -mean of credit[t] advantage log p[t],    advantage = (reward - mean) / deviation of a prompt's answers

Paper: Attention Illuminates LLM Reasoning: The Preplan-and-Anchor Rhythm Enables Fine-Grained Policy Optimization,
    arXiv:2510.13554
Code: none

Differs: only the abstract and reviews could be read here, in which the metrics and the strategies are words. What they
leave open is set here: window 10, near 10, far 50, the outer 30% of heads, 40% of an answer's tokens, amplify 1.5,
halves for coupling, and one step per draw (no clipped ratios).
"""

from __future__ import annotations

from statistics import fmean
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ...core.errors import SpecError
from ...core.stats import MeanDistance, Stat
from ...core.tile import Tile
from ...hosts.handles import Watching, watch
from ..base import ClaimNumbers, MethodSystem
from ._rewards import reinforced
from ._rhythm import following

Credit = Literal["uniform", "preplan", "anchor", "coupled"]
KINDS: tuple[Credit, ...] = ("uniform", "coupled")  # that are compared


class PreplanAnchor(MethodSystem):
    """Settings: ``window``, ``near``, ``far`` of the metrics; ``share`` of heads; ``top`` and ``amplify`` of credit."""

    slug = "preplan-anchor"
    title = "Preplan and anchor"
    paper = "https://arxiv.org/abs/2510.13554"

    def __init__(
        self, window: int = 10, near: int = 10, far: int = 50, share: float = 0.3, top: float = 0.4,
        amplify: float = 1.5,
    ):  # fmt: skip
        if window < 1 or not 0 <= near <= far or not (0 < share <= 0.5 and 0 < top < 1):
            raise SpecError(f"{self}: expected window >= 1, 0 <= near <= far, 0 < share <= 0.5 and 0 < top < 1")
        self.window, self.near, self.far = window, near, far
        self.share, self.top, self.amplify = share, top, amplify

    def apply(self, model: nn.Module) -> Watching:
        """Watch a model, which answers as it would; see :meth:`rhythm`."""
        return watch(model, ClippedDistance(self.window), FutureMass(self.near, self.far), MeanDistance(), kind="self")

    def rhythm(self, watching: Watching) -> tuple[Tensor, Tensor]:
        """waad and fai ``[B, N]`` of the last call, which read whole texts without padding."""
        waad, mass, distance = (
            torch.cat([watching.seen[site.path][name] for site in watching.sites], 1)
            for name in ("clipped_distance", "future_mass", "mean_distance")
        )
        ranked = distance.mean((0, 2)).argsort()
        some = max(1, round(self.share * len(ranked)))
        size = mass.shape[-1]
        later = (size - torch.arange(size)).clamp(max=self.far + 1) - self.near
        return waad[:, ranked[:some]].mean(1), mass[:, ranked[-some:]].mean(1) / later.clamp(min=1)

    def chosen(self, waad: Tensor, fai: Tensor) -> tuple[Tensor, Tensor]:
        """Preplan tokens and anchors of answers ``[B, T]``, from their metrics: 1 there, 0 elsewhere."""
        count = max(1, round(self.top * waad.shape[1]))
        change = (waad - waad.roll(-1, 1)).abs()
        change[:, -1] = 0
        preplan, anchor = (torch.zeros_like(x).scatter(1, x.topk(count).indices, 1) for x in (change, fai))
        return preplan, anchor

    def credit(self, waad: Tensor, fai: Tensor, kind: Credit = "coupled") -> Tensor:
        """What each token of answers ``[B, T]`` is credited with, from their metrics."""
        if kind not in get_args(Credit):
            raise SpecError(f"PreplanAnchor.credit: expected a kind of {', '.join(get_args(Credit))}; got {kind!r}")
        preplan, anchor = ((self.amplify - 1) * x for x in self.chosen(waad, fai))
        more = torch.zeros_like(waad)
        if kind != "coupled":
            return 1 + {"uniform": more, "preplan": preplan, "anchor": anchor}[kind]
        for b, t in ((anchor > 0) & (preplan == 0)).nonzero().tolist():
            before = preplan[b, :t].nonzero()
            if len(before):
                more[b, before[-1]] += anchor[b, t] / 2
                anchor[b, t] /= 2
        return 1 + torch.maximum(preplan, anchor) + more

    def claim(self) -> ClaimNumbers:
        """The rhythm in prose against shifted copies; and a small model that learns by rewards, with either credit."""
        from ...study import probes

        found = following(PreplanAnchor(top=0.1), probes.embedded())
        learned = {kind: [reinforced(PreplanAnchor(near=1, far=4), kind, seed) for seed in range(4)] for kind in KINDS}
        uniform, coupled = (fmean(each) for each in learned.values())
        gap = torch.tensor(learned["coupled"]) - torch.tensor(learned["uniform"])
        error = float(gap.std()) / len(gap) ** 0.5
        more = found[0] - found[1]
        return ClaimNumbers.decide(
            {name: round(float(x.mean()), 3) for name, x in zip(("near_a_preplan", "shifted"), found, strict=True)}
            | {kind: [round(x, 3) for x in each] for kind, each in learned.items()},
            f"Of the anchors in prose {found[0].mean():.0%} are at or up to two tokens after a preplan token, of"
            f" shifted ones {found[1].mean():.0%}. After as many steps by rewards {uniform:.1%} of the answers are"
            f" right with uniform credit, {coupled:.1%} with coupled credit (difference's standard error {error:.1%}).",
            anchors_follow_preplans=float(more.mean()) > 2 * float(more.std()) / len(more) ** 0.5,
            credit_beats_uniform=coupled - uniform > 2 * error,
        )


class ClippedDistance(Stat):
    """``sum_k w[t, k] min(|t - k|, window)``, ``[B, H, N]``."""

    def __init__(self, window: int):
        super().__init__()
        self.window = window

    def see(self, tile: Tile) -> tuple[Tensor, ...]:
        return ((tile.weights * tile.at.distance.abs().clamp(max=self.window)).sum(-1),)


class FutureMass(Stat):
    """Mass that each key receives from queries that come ``near`` to ``far`` tokens later, ``[B, H, M]``."""

    axis = "keys"

    def __init__(self, near: int, far: int):
        super().__init__()
        self.near, self.far = near, far

    def see(self, tile: Tile) -> tuple[Tensor, ...]:
        later = (tile.at.distance >= self.near) & (tile.at.distance <= self.far)
        return (torch.where(later, tile.weights, 0).sum(-2),)
