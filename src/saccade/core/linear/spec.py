"""The program of kernelised attention, and the state that it carries along."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SpecError
from ..tile import Part
from .features import Feature, as_feature


@dataclass(frozen=True)
class LinearState:
    """What all tokens so far left behind: a decode cache whose size does not depend on how many there were.

    ``S [B, H, F, Dv]`` sums (decayed) features of keys times values; ``z [B, H, F]`` sums the features alone, for a
    spec with ``normalize=True``, else ``None``. Both float32, or float64 for float64 inputs.
    """

    S: Tensor
    z: Tensor | None = None


class Decay(Part):
    """A constant log-decay, one per head ``[H]`` or one for all; a parameter is learned."""

    def __init__(self, log: Tensor | float):
        super().__init__()
        log = log if isinstance(log, Tensor) else torch.tensor(float(log))
        if log.ndim > 1 or not bool((log <= 0).all()):
            raise SpecError(f"decay must be log-decays <= 0, a number or one per head [H]; got {log}")
        self.hold("log", log)
        self.log: Tensor


class LinearAttention(nn.Module):
    """Kernelised attention. With ``f`` the feature map, and per head a state S [F, Dv] (and z [F]):

        S[t] = exp(g[t]) S[t-1] + beta[t] f(k[t]) (v[t] - delta f(k[t])' exp(g[t]) S[t-1])'
        z[t] = exp(g[t]) z[t-1] + beta[t] f(k[t])
        out[t] = scale f(q[t])' S[t]          (/ (scale f(q[t])' z[t] + eps) with normalize)

    The log-decay ``g`` (per head, per token, or per token and channel), and ``beta`` (an input gate; with ``delta``
    the writing strength of the delta rule) come with each call; no decay and 1 if not given. Not causal: every query
    reads the state after the last key, and there is no decay and no delta rule.

    Args:
        feature: a part of :mod:`saccade.linear.features`, or a function of vectors ``[..., D]``; the identity if not
            given. It must treat each vector alone.
        normalize: divide by the sum of the weights.
        scale: factor on the features of the queries. (fla's functions default to ``D ** -0.5``.)
        decay: constant log-decay per head, a number or ``[H]`` (RetNet, Lightning); a parameter is learned.
        delta: write by the delta rule: ``k`` should have norm at most 1 then, and beta lie in 0..2.
        causal: a query sees its own and earlier keys; else all of them.
        eps: added to the sum of the weights.

    Raises:
        SpecError: settings that mean nothing together.
    """

    def __init__(
        self,
        feature: Any = None,
        *,
        normalize: bool = False,
        scale: float = 1.0,
        decay: Tensor | float | None = None,
        delta: bool = False,
        causal: bool = True,
        eps: float = 1e-6,
    ):
        super().__init__()
        if not causal and (delta or decay is not None):
            raise SpecError(f"{'the delta rule' if delta else 'a decay'} needs an order of tokens: causal=True")
        if delta and normalize:
            raise SpecError("the delta rule has no sum of weights to divide by: normalize=False")
        self.feature: Feature = as_feature(feature)
        self.normalize, self.scale, self.delta, self.causal, self.eps = normalize, scale, delta, causal, eps
        self.decay: Decay | None = None if decay is None else Decay(decay)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        """:func:`saccade.linear_attention` with this program."""
        from .attend import linear_attention

        return linear_attention(q, k, v, self, **options)

    def extra_repr(self) -> str:
        return ", ".join(f"{n}={getattr(self, n)}" for n in ("normalize", "scale", "delta", "causal", "eps"))
