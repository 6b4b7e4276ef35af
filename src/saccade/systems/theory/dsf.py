"""Attention, state space models and recurrent networks as one linear system whose matrices vary with the token.

    h[t] = Lambda[t] h[t-1] + B[t] u[t],     y[t] = C[t] h[t] + D u[t],     h in R^(F Dv) of each head

    Lambda[t] = a[t] eta[t-1] / eta[t] I     B[t] = (b[t] / eta[t]) (k[t] (x) Wv)     C[t] = q[t]' (x) I     D = d Wv

    kind        q, k               eta[t]              a[t]                         b[t]       d
    linear      elu + 1 of both    q[t] . sum k[..t]   1                            1          0
    normalized  as they are        exp(w . u[t])       1                            1          0
    ssm         C u, B u           1                   exp(-softplus(w . u[t]) A)   softplus   learned
    lstm        output, input gate 1                   sigmoid(-forget)^alpha       1          0    (F = Dv = 1)

u are the layer's inputs; (x) is Kronecker's product. Softmax attention is the same with infinitely many features F:
all products of coordinates, of which those of at most ``order`` factors give the Taylor series of exp.

Paper: Understanding the differences in Foundation Models, arXiv:2405.15731
Code: https://github.com/IntelligentControlSystems/dsf-mqar (zoology/mixers/attention.py: SelfLinAttention, MHNA;
    mamba.py: S6_2; lstm.py: qLSTM with reversed=True)

Differs: convolutions and gates around the mixers belong to the block. Every kind has heads and values of its own; the
official S6_2 is one head whose values are its inputs, its qLSTM twice as wide as the stream. A of ``ssm`` starts at 1,
alpha at 1 and d at 1 as there.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.errors import SpecError
from ...core.linear import LinearAttention
from ...core.linear.features import Elu1
from ...nn import MultiHead
from ...nn.backbones import Place
from ..base import ClaimNumbers, LayerSystem, Promises
from ._dynamics import products, simulated

Kind = Literal["linear", "normalized", "ssm", "lstm"]
EQUAL = 1e-9  # relative difference of the two ways to run one layer, in float64
ORDERS = (2, 4, 6)  # even: the series stays positive


class Dynamical(MultiHead):
    """One of the four kinds, run by the engine; :func:`._dynamics.matrices` gives the system that it is."""

    def __init__(self, place: Place, kind: Kind):
        heads = place.width if kind == "lstm" else place.heads
        spec = LinearAttention(Elu1(), normalize=True, eps=0.0) if kind == "linear" else LinearAttention()
        super().__init__(spec, place.width, heads, positions=None if kind == "lstm" else place.positions)
        self.kind = kind
        self.step = None if kind == "linear" else nn.Linear(place.width, heads)
        self.rate = nn.Parameter(torch.zeros(heads)) if kind in ("ssm", "lstm") else None  # log A, log alpha
        self.skip = nn.Parameter(torch.ones(heads)) if kind == "ssm" else None

    def project(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values; of ``lstm`` the output gate, the input gate and what is written."""
        q, k, v = super().project(x, context)
        return (q.sigmoid(), k.sigmoid(), v) if self.kind == "lstm" else (q, k, v)

    def options(self, context: Tensor) -> dict[str, Any]:
        """The log of a, and b."""
        if self.step is None or self.rate is None:
            return {}
        step = F.softplus(self.step(context)).mT
        given = {"log_decay": -self.rate.exp()[:, None] * step}
        return given | {"beta": step} if self.kind == "ssm" else given

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **given: Any) -> Tensor:
        """C h + D u of every head."""
        out = super().attend(q, k, v, **given)
        return out if self.skip is None else out + self.skip[:, None, None] * v

    def merge(self, out: Tensor, x: Tensor) -> Tensor:
        """Over eta, where it is of the token alone; then the heads together."""
        return super().merge(out / self.eta(x) if self.kind == "normalized" else out, x)

    def eta(self, x: Tensor) -> Tensor:
        """exp(w . u), ``[B, H, N, 1]``."""
        assert self.step is not None
        return self.step(x).mT[..., None].exp()


class Dsf(LayerSystem):
    """Settings: ``kind``."""

    slug = "dsf"
    title = "Dynamical systems framework"
    paper = "https://arxiv.org/abs/2405.15731"
    code = "https://github.com/IntelligentControlSystems/dsf-mqar"
    promises = Promises(exponent=1.0, nonnegative=False, hosts=())

    def __init__(self, kind: Kind = "normalized"):
        if kind not in get_args(Kind):
            raise SpecError(f"dsf: kind must be one of {', '.join(get_args(Kind))}; got {kind!r}")
        self.kind = kind

    def layer(self, place: Place) -> Dynamical:
        """A layer of the kind."""
        return Dynamical(place, self.kind)

    def claim(self) -> ClaimNumbers:
        """Each kind by the engine against its own matrices, step by step; softmax against more and more features."""
        off = {}
        for kind in get_args(Kind):
            torch.manual_seed(0)
            layer = Dsf(kind).layer(Place(16, 4, 0, 1, None, None)).double()
            x = torch.randn(2, 200, 16, dtype=torch.float64)
            with torch.no_grad():
                ours, theirs = layer(x), simulated(layer, x)
            off[kind] = float((ours - theirs).abs().max() / theirs.abs().max())
        gaps = {order: _softmax_gap(order) for order in ORDERS}
        return ClaimNumbers.decide(
            {f"difference_{kind}": value for kind, value in off.items()}
            | {f"softmax_gap_order{order}": round(gap, 6) for order, gap in gaps.items()},
            "Run by the engine and as a system with explicit matrices, the four kinds differ by"
            f" {max(off.values()):.0e} at most (relative, float64). Softmax attention's weights differ from a system's"
            f" with features of order 2 by {gaps[2]:.3f}, of order 4 by {gaps[4]:.4f}, of order 6 by {gaps[6]:.5f}.",
            equal=max(off.values()) <= EQUAL,
            softmax_is_the_limit=gaps[2] > gaps[4] > gaps[6],
        )


def _softmax_gap(order: int) -> float:
    """Greatest difference of causal softmax weights and those of a system with these features."""
    q, k = torch.randn(2, 64, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = (q @ k.mT / 2).masked_fill(torch.ones(64, 64).triu(1).bool(), -torch.inf).softmax(-1)
    kernel = (products(q / 2**0.5, order) @ products(k / 2**0.5, order).mT).tril()
    return float((kernel / kernel.sum(-1, keepdim=True) - exact).abs().max())
