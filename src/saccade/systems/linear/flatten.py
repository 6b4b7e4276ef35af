"""FLatten: linear attention of images whose weights are focused and whose output is not of low rank.

    x        = (relu(q) + 1e-6) / softplus(scale),   the same of k + place     scale [width], place [N, width] learned
    focus(x) = x³ |x| / |x³|                                                   norms over all heads together
    w[i, j]  = focus(q[i]) . focus(k[j]) / sum over j,     o[i] = sum over j of w[i, j] v[j] + convolution(v)[i]

The cube moves queries and keys that point almost the same way together, and others apart, so that weights are spikier;
the convolution by channel (5 x 5 over the grid, one for all heads) is a sparse matrix added to one whose rank is at
most a head's width.

Paper: FLatten Transformer: Vision Transformer using Focused Linear Attention, arXiv:2308.00442
Code: https://github.com/LeapLabTHU/FLatten-Transformer (models/flatten_swin.py: FocusedLinearAttention)

Differs: nothing in the layer; ``place`` needs a fixed number of tokens and is there only if ``tokens`` says how many.
First weights of the projections are the backbone's. A grid that is not square says its ``rows``.
:class:`saccade.linear.features.Focused` takes the norms head by head instead.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.linear import LinearAttention, linear_attention, linear_weights
from ...nn.attention import split
from ...nn.backbones import Place
from ..base import ClaimNumbers, LayerSystem, Promises
from ._grid import GridLayer


class FLatten(LayerSystem):
    """Settings: ``tokens`` of the grid, for learned places of the keys; ``power`` of the focus; ``kernel`` of the
    convolution; ``rows`` of the grid, as square as the number of tokens allows if not given."""

    slug = "flatten"
    title = "FLatten (focused linear attention)"
    paper = "https://arxiv.org/abs/2308.00442"
    code = "https://github.com/LeapLabTHU/FLatten-Transformer"
    promises = Promises(causal=False, cross=False, exponent=1.0, decodes=False, padding=False, hosts=())

    def __init__(self, tokens: int | None = None, power: float = 3.0, kernel: int = 5, rows: int | None = None):
        self.tokens, self.power, self.kernel, self.rows = tokens, power, kernel, rows

    def layer(self, place: Place) -> nn.Module:
        """The layer; positions of the backbone are not used."""
        return Focused(place, self)

    def claim(self) -> ClaimNumbers:
        """Vision transformers with each, trained alike: accuracy, entropy of the weights, rank of what they do."""
        from ._pictures import TOKENS, learn, pictures, plain

        result = learn({"softmax": None, "plain": plain(), "flatten": FLatten(TOKENS)})
        seen = next(pictures(20_000))[0]
        found = {name: maps_of(models, seen) for name, models in result.models.items()}
        entropy, rank = ({name: pair[i] for name, pair in found.items()} for i in (0, 1))
        gain = result.excess("flatten", "plain")
        return ClaimNumbers.decide(
            result.numbers()
            | {f"entropy_{name}": round(x, 3) for name, x in entropy.items()}
            | {f"rank_{name}": round(x, 2) for name, x in rank.items()}
            | {"excess_over_plain": round(gain.mean, 4), "excess_error": round(gain.error, 4)},
            f"Entropy of the weights {entropy['flatten']:.2f} nats (softmax {entropy['softmax']:.2f}, plain linear"
            f" attention {entropy['plain']:.2f}), rank of what a head does to the {TOKENS} values {rank['flatten']:.0f}"
            f" (softmax {rank['softmax']:.0f}, plain {rank['plain']:.0f}). Of unseen pictures"
            f" {result.mean('flatten'):.1%} are classed right, by plain linear attention {result.mean('plain'):.1%}, by"
            f" softmax attention {result.mean('softmax'):.1%}.",
            entropy_nearer_softmax=_nearer(entropy),
            rank_nearer_softmax=_nearer(rank),
            accuracy_up=gain.above,
        )


class Focused(GridLayer):
    """The layer of this place."""

    spec: LinearAttention

    def __init__(self, place: Place, system: FLatten):
        super().__init__(LinearAttention(normalize=True, causal=False, eps=1e-6), place, system.rows)
        width, kernel, inner = place.width, system.kernel, place.width // place.heads
        self.power = system.power
        self.scale = nn.Parameter(torch.zeros(width))
        self.place = None if system.tokens is None else nn.Parameter(torch.zeros(system.tokens, width))
        self.convolution = nn.Conv2d(inner, inner, kernel, padding=kernel // 2, groups=inner)

    def project(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Focused queries and keys, and values."""
        k = self.k(x) if self.place is None else self.k(x) + self.place
        return (
            split(self.focus(self.q(x)), self.heads),
            split(self.focus(k), self.heads),
            split(self.v(x), self.heads),
        )

    def focus(self, x: Tensor) -> Tensor:
        """Of ``[B, N, width]``, the same shape."""
        x = (x.relu() + 1e-6) / F.softplus(self.scale)
        sharp = (x / x.amax(-1, keepdim=True)) ** self.power  # the quotient cancels, and cannot overflow
        return sharp * (x.norm(dim=-1, keepdim=True) / sharp.norm(dim=-1, keepdim=True))

    def read(self, q: Tensor, k: Tensor, v: Tensor, **given: Any) -> Tensor:
        out = linear_attention(q, k / k.shape[2], v, self.spec, **given)  # a mean, as eps is beside one
        return out + self.convolved(v)

    def convolved(self, v: Tensor) -> Tensor:
        """The same kernel over the grid of every head, ``[B, H, N, D]``."""
        each = v.flatten(0, 1)[:, None]
        picture = self.picture(each)
        return self.convolution(picture).flatten(2).mT.unflatten(0, v.shape[:2])


def _nearer(found: dict[str, float]) -> bool:
    return abs(found["flatten"] - found["softmax"]) < abs(found["plain"] - found["softmax"])


@torch.no_grad()
def maps_of(models: list[Any], pictures: Tensor) -> tuple[float, float]:
    """Mean entropy of the rows of the weights, and mean rank of the matrix that a head's values are multiplied with.

    The rank counts singular values above a hundredth of the largest. With a convolution its matrix, the same for every
    channel but for the kernel, is that of the first channel.
    """
    from ...core.attend import weights
    from ...core.spec import Attention

    entropies, ranks = [], []
    for model in models:
        x = model.positions(model.patches(pictures).flatten(2).mT)
        for block in model.stack.blocks:
            layer = block.attention
            q, k, v = layer.project(block.before(x), block.before(x))
            w = weights(q, k, layer.spec) if isinstance(layer.spec, Attention) else linear_weights(q, k, layer.spec)
            entropies.append(float(torch.special.entr(w).sum(-1).mean()))
            if isinstance(layer, Focused):
                n, width = v.shape[2:]
                ones = torch.eye(n)[:, None, :, None].expand(n, 1, n, width)
                nothing = layer.convolved(torch.zeros(1, 1, n, width))
                w = w + (layer.convolved(ones) - nothing)[:, 0, :, 0].mT
            ranks.append(float(torch.linalg.matrix_rank(w.double(), rtol=0.01).double().mean()))
            x = block(x)
    return statistics.fmean(entropies), statistics.fmean(ranks)
