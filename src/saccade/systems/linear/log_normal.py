"""Linear log-normal attention: exponential features, scaled so that the weights are distributed as softmax's are.

    sigma²      = (std(q)² std(k)² - B) / (2 A),   alpha = sigma / std(q),   beta = sigma / std(k)
    far[i, j]   = sum over d of exp(alpha q[i, d]) exp(beta k[j, d]),        over its sum over j
    near[i, j]  = softmax of q[i] . k[j] / sqrt(D), over the j in i's block of D tokens
    o[i]        = sum over j of (far[i, j] + near[i, j]) / 2  v[j]

Softmax's weights over normal queries and keys are log-normal, with log-variance ``std(q)² std(k)²``. A sum of
log-normals is nearly one too; over the widths of interest its log-variance is ``A (alpha² std(q)² + beta² std(k)²)``
plus B, both from a fit. Equating the two is the moment matching.

Paper: Linear Log-Normal Attention with Unbiased Concentration, arXiv:2311.13541
Code: supplementary material (lln/lln_attention.py: LLNAttention, BlockDiagAttention, LLNPlusDiagAttention)

Differs: the official code takes ``std`` over the whole tensor at hand, of all sequences and tokens, in training and
after; here that holds in training, which also keeps a running mean, and afterwards the mean is used: so a sequence
depends neither on its batch nor on later tokens, and decodes. The official code divides each key by the greatest of all
(which cancels but for its eps); here exponents of keys stop at 60 instead. A and B were fitted at one width of heads
(not said which) and serve all.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...core import masks
from ...core.attend import attention
from ...core.linear import LinearAttention, features
from ...core.spec import Attention
from ...nn import MultiHead, StateCache
from ...nn.attention import AnyCache, grouped, padded
from ...nn.backbones import Place
from ...nn.positions import RoPE
from ..base import ClaimNumbers, LayerSystem, Promises
from ._blocks import BlockCache
from ._log_normal_features import factors, program, shapes

RECENT = 0.1  # weight of the newest batch in the running mean
SPREADS = (1.0, 1.25, 1.5)  # of queries and keys, for the claim
WITHIN = 1.25  # "matched": log-variance and concentration within this factor of softmax's
NORMAL = 0.05  # "log-normal": greatest difference of the distribution functions


class LogNormal(LayerSystem):
    """Settings: ``causal``."""

    slug = "log-normal"
    title = "Linear log-normal attention (LLN + Diag)"
    paper = "https://arxiv.org/abs/2311.13541"
    promises = Promises(cross=False, exponent=1.0, unit_rows=True, hosts=())

    def __init__(self, causal: bool = True):
        self.causal = causal

    def layer(self, place: Place) -> nn.Module:
        """The layer, with the backbone's positions."""
        return LogNormalAttention(place, self.causal)

    def claim(self) -> ClaimNumbers:
        """Distribution and concentration beside softmax's, matched and not; and small language models."""
        from ...study.trainer import Setup, compare

        def beside_softmax(which: str, what: str) -> list[float]:
            return [row[which][what] / row["softmax"][what] for row in rows.values()]

        def ours(setup: Setup, layer: int) -> nn.Module:
            return self.layer(Place(setup.width, setup.heads, layer, setup.layers, RoPE(), None))

        rows = {str(spread): shapes(spread) for spread in SPREADS}
        variance = beside_softmax("matched", "log_variance")
        concentration, unmatched = (beside_softmax(which, "concentration") for which in ("matched", "unmatched"))
        result = compare(
            {
                "softmax": lambda setup, layer: Attention(mask=masks.Causal()),
                "elu": lambda setup, layer: LinearAttention(features.Elu1(), normalize=True),
                "log-normal": ours,
            },
            Setup(steps=100, seeds=(0, 1)),
        )
        gain = result.excess("log-normal", "elu")
        return ClaimNumbers.decide(
            {f"shapes_at_{spread}": row for spread, row in rows.items()}
            | result.numbers()
            | {"excess_over_elu": round(gain.mean, 4), "excess_error": round(gain.error, 4)},
            f"At spreads of {', '.join(rows)} the weights' log-variance is {_said(variance)} of softmax's, their"
            f" concentration (what entropy lacks to uniform) {_said(concentration)}, {_said(unmatched)} without"
            f" matching. Validation loss {gain.mean:+.4f} nats per byte (standard error {gain.error:.4f}) against"
            f" linear attention with elu + 1, {result.excess('log-normal', 'softmax').mean:+.4f} against softmax.",
            log_normal=all(row["matched"]["distance_from_normal"] <= NORMAL for row in rows.values()),
            variance_matched=all(1 / WITHIN <= x <= WITHIN for x in variance),
            concentration_matched=all(1 / WITHIN <= x <= WITHIN for x in concentration),
            better_than_elu=gain.below,
        )


@dataclass
class LogNormalCache(StateCache):
    """What the tokens so far left in the state, and the keys and values of the last block."""

    near: BlockCache = field(default_factory=BlockCache)

    @property
    def nbytes(self) -> int:
        """Bytes of both."""
        return super().nbytes + self.near.nbytes


class LogNormalAttention(MultiHead):
    """The layer of this place. ``spread``: running means of ``std(q)`` and ``std(k)``."""

    spread: Tensor

    def __init__(self, place: Place, causal: bool = True):
        super().__init__(program(causal), place.width, place.heads, kv_heads=place.kv_heads, positions=place.positions)
        own = masks.Blocks(self.head_width)
        self.near = Attention(mask=masks.Causal() & own if causal else own)
        self.register_buffer("spread", torch.ones(2))

    def cache(self) -> LogNormalCache:
        """An empty cache."""
        return LogNormalCache(near=BlockCache(size=self.head_width))

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, cache: AnyCache | None = None, keep: Tensor | None = None,
        **given: Any,
    ) -> Tensor:  # fmt: skip
        """The mean of both."""
        if self.training:
            with torch.no_grad():
                spread = torch.stack([q.std(), k.std()]).to(self.spread)
                self.spread.lerp_(spread, RECENT)
        else:
            spread = self.spread
        alpha, beta = factors(spread).to(q.dtype)
        far = super().attend(alpha * q, beta * k, v, cache=cache, keep=keep, **given)
        k, v = grouped(k, v)
        n = k.shape[2]
        if isinstance(cache, LogNormalCache):
            k, v = cache.near.append(k, v)
        near = self.near if keep is None else padded(self.near, keep)
        return (far + attention(q, k, v, near, offset=k.shape[2] - n)) / 2


def _said(ratios: list[float]) -> str:
    return ", ".join(f"{x:.2f}" for x in ratios)
