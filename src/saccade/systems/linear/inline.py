"""InLine: linear attention of images that is injective, beside a residual that sees what is near.

    w[i, j] = s q[i] . k[j] - mean over j of (s q[i] . k[j]) + 1 / N,    s = 1 / (N sqrt(D))
    o[i]    = sum over j of w[i, j] v[j]  +  sum over the 3 x 3 around i of r v

Rows sum to one by subtraction: dividing by the sum forgets how long a query is, and two queries of one direction get
the same weights. The nine weights ``r`` by channel come from the mean token, through a perceptron of each head's share.
Linear: ``o = s q (K' V) + (1 - q . mean k / sqrt(D)) mean v``.

Paper: Bridging the Divide: Reconsidering Softmax and Linear Attention, arXiv:2412.06590
Code: https://github.com/LeapLabTHU/InLine (models/inline_swin.py, inline_deit.py: InLineAttention)

Differs: nothing in the layer; the kernel function is the identity (the default of the official code, which also has
relu, leaky relu and exp). Without DeiT's class token the residual goes to every token. First weights of the projections
are the backbone's. A grid that is not square says its ``rows``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.linear import LinearAttention, linear_attention, linear_weights
from ...nn.backbones import Place
from ..base import ClaimNumbers, LayerSystem, Promises
from ._grid import GridLayer


class InLine(LayerSystem):
    """Settings: ``rows`` of the grid; as square as the number of tokens allows if not given."""

    slug = "inline"
    title = "InLine (injective linear attention)"
    paper = "https://arxiv.org/abs/2412.06590"
    code = "https://github.com/LeapLabTHU/InLine"
    promises = Promises(
        causal=False, cross=False, exponent=1.0, decodes=False, padding=False, unit_rows=True, nonnegative=False,
        hosts=(),
    )  # fmt: skip

    def __init__(self, rows: int | None = None):
        self.rows = rows

    def layer(self, place: Place) -> nn.Module:
        """The layer; positions of the backbone are not used."""
        return Injective(place, self.rows)

    def claim(self) -> ClaimNumbers:
        """Weights of queries that differ in length alone, and vision transformers with each, trained alike."""
        from ._pictures import learn, plain

        apart = {"inline": confusion(weights), "plain": confusion(_relu_weights)}
        result = learn({"softmax": None, "plain": plain(), "inline": self})
        gain = result.excess("inline", "plain")
        return ClaimNumbers.decide(
            result.numbers()
            | {f"difference_of_weights_{name}": x for name, x in apart.items()}
            | {"excess_over_plain": round(gain.mean, 4), "excess_error": round(gain.error, 4)},
            f"A query and twice the query differ in their weights by {apart['inline']:.2g} of the largest (with relu"
            f" features and division {apart['plain']:.1g}). Of unseen pictures {result.mean('inline'):.1%} are named"
            f" right, by plain linear attention {result.mean('plain'):.1%}, by softmax attention"
            f" {result.mean('softmax'):.1%}.",
            queries_are_told_apart=apart["inline"] > 1e-3,
            plain_confuses_them=apart["plain"] < 1e-6,
            accuracy_above_plain=gain.above,
        )


class Injective(GridLayer):
    """The layer of this place."""

    spec: LinearAttention

    def __init__(self, place: Place, rows: int | None):
        super().__init__(LinearAttention(causal=False), place, rows)
        width, heads = place.width, place.heads
        self.near = nn.Sequential(
            nn.Conv1d(width, width, 1, groups=heads), nn.GELU(), nn.Conv1d(width, 9 * width, 1, groups=heads)
        )

    def options(self, context: Tensor) -> dict[str, Any]:
        """The residual's weights ``[B * width, 1, 3, 3]``, of the mean token."""
        return {"residual": self.near(context.mean(1)[..., None]).reshape(-1, 1, 3, 3)}

    def read(self, q: Tensor, k: Tensor, v: Tensor, *, residual: Tensor | None = None, **given: Any) -> Tensor:
        n, scale = q.shape[2], self.head_width**-0.5
        out = linear_attention(q, k * (scale / n), v, self.spec, **given)
        out = out + (1 - q @ k.mean(2)[..., None] * scale) * v.mean(2, keepdim=True)
        if residual is None:
            return out
        picture = self.picture(v)
        near = F.conv2d(picture.flatten(0, 1)[None], residual, padding=1, groups=len(residual))
        return out + self.heads_of(near[0].unflatten(0, picture.shape[:2]))


def weights(q: Tensor, k: Tensor) -> Tensor:
    """The weights ``[B, H, N, M]`` that the layer means, without its residual."""
    scores = q @ k.mT * (q.shape[-1] ** -0.5 / k.shape[2])
    return scores - scores.mean(-1, keepdim=True) + 1 / k.shape[2]


def _relu_weights(q: Tensor, k: Tensor) -> Tensor:
    return linear_weights(q, k, LinearAttention(F.relu, normalize=True, causal=False, eps=0.0))


def confusion(function: Any) -> float:
    """How far the weights of queries and of those twice as long are apart, of the largest weight."""
    q, k = torch.randn(2, 1, 4, 64, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64).unbind(0)
    one, other = function(q, k), function(2 * q, k)
    return float((one - other).abs().max() / one.abs().max())
