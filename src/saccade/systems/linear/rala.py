"""RALA: linear attention of images whose state and whose output have a higher rank.

    f(x)  = elu(x) + 1,   mean_q = mean over tokens of f(q)
    a[j]  = N softmax over j of (f(k[j]) . mean_q / sqrt(D))                               which keys matter to all
    o[i]  = sum over j of a[j] (turn(f(q[i])) . turn(f(k[j]))) v[j] / sum over j of a[j] f(q[i]) . f(k[j])
    y     = ((o + convolution(v)) * (x Wu)) W                                              which the token lets through

``a`` weighs what is summed into the state, whose terms are no longer much the same; the product with ``x Wu`` gives
each token's output directions of its own. ``turn`` is a rotation by row in the first half of a head and by column in
the second; ``convolution`` goes over the grid by channel, 5 x 5.

Paper: Breaking the Low-Rank Dilemma of Linear Attention, arXiv:2411.07635
Code: https://github.com/qhfan/RALA (classfication/RALA.py: GateLinearAttentionNoSilu, RoPE)

Differs: nothing in the layer. RAVLT's four stages, its convolution before each block and the one inside its perceptron
belong to its backbone. First weights are the backbone's. A grid that is not square says its ``rows``.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.errors import SpecError
from ...core.linear import LinearAttention, features, linear_attention
from ...nn import MultiHead
from ...nn.attention import split
from ...nn.backbones import Place
from ..base import ClaimNumbers, LayerSystem, Promises
from ._grid import GridLayer, sides

NEAR = 0.02  # of accuracy that may be missing to softmax attention


class RALA(LayerSystem):
    """Settings: ``rows`` of the grid; as square as the number of tokens allows if not given."""

    slug = "rala"
    title = "RALA (rank-augmented linear attention)"
    paper = "https://arxiv.org/abs/2411.07635"
    code = "https://github.com/qhfan/RALA"
    promises = Promises(causal=False, cross=False, exponent=1.0, decodes=False, padding=False, hosts=())

    def __init__(self, rows: int | None = None):
        self.rows = rows

    def layer(self, place: Place) -> nn.Module:
        """The layer; positions of the backbone are not used."""
        return RankAugmented(place, self.rows)

    def claim(self) -> ClaimNumbers:
        """Vision transformers with each, trained alike: accuracy, and ranks of states and outputs."""
        from ._pictures import learn, pictures, plain

        result = learn({"softmax": None, "plain": plain(), "rala": self})
        seen = next(pictures(20_000))[0]
        ranks = {name: layer_ranks(result.models[name], seen) for name in ("plain", "rala")}
        gap = result.excess("rala", "softmax")
        (state, output), (state_before, output_before) = ranks["rala"], ranks["plain"]
        return ClaimNumbers.decide(
            result.numbers()
            | {f"rank_of_state_{name}": round(pair[0], 2) for name, pair in ranks.items()}
            | {f"rank_of_output_{name}": round(pair[1], 2) for name, pair in ranks.items()}
            | {"excess_over_softmax": round(gap.mean, 4), "excess_error": round(gap.error, 4)},
            f"Effective rank of a head's state {state:.1f} (plain linear attention {state_before:.1f}), of a layer's"
            f" output {output:.1f} ({output_before:.1f}). Of unseen pictures {result.mean('rala'):.1%} are classed"
            f" right, by plain linear attention {result.mean('plain'):.1%}, by softmax {result.mean('softmax'):.1%}.",
            rank_of_state_rises=state > state_before,
            rank_of_output_rises=output > output_before,
            near_softmax=gap.mean >= -NEAR,
        )


class RankAugmented(GridLayer):
    """The layer of this place. Raises: SpecError for heads whose width is no multiple of four."""

    spec: LinearAttention

    def __init__(self, place: Place, rows: int | None):
        # each key's weight in the sum comes as beta, and the sum of weights is divided by apart: it is not turned
        super().__init__(LinearAttention(causal=False), place, rows)
        if self.head_width % 4:
            raise SpecError(f"RALA turns pairs by row and by column: a head's width of {self.head_width} is no 4 m")
        self.through = nn.Linear(place.width, place.width)
        self.convolution = nn.Conv2d(place.width, place.width, 5, padding=2, groups=place.width)

    def project(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``elu + 1`` of queries and keys."""
        q, k, v = super().project(x, context)
        return F.elu(q) + 1, F.elu(k) + 1, v

    def read(self, q: Tensor, k: Tensor, v: Tensor, **given: Any) -> Tensor:
        n, grid = q.shape[2], sides(q.shape[2], self.rows)
        matter = n * (k @ q.mean(2)[..., None] * self.head_width**-0.5).softmax(2)[..., 0]
        total = q @ (matter[..., None] * k).mean(2)[..., None] + 1e-6
        out = linear_attention(turn(q, grid), turn(k, grid), v / n, self.spec, beta=matter, **given) / total
        return out + self.heads_of(self.convolution(self.picture(v)))

    def merge(self, out: Tensor, x: Tensor) -> Tensor:
        return super().merge(out * split(self.through(x), self.heads), x)


def turn(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Neighbours in ``[B, H, N, D]`` turned: by the row in the first half of D, by the column in the second."""
    exact = torch.promote_types(x.dtype, torch.float32)
    speed = 10_000.0 ** -torch.linspace(0, 1, x.shape[-1] // 4, dtype=exact, device=x.device)
    rows, columns = (torch.arange(size, dtype=exact, device=x.device) for size in grid)
    down, right = (place.flatten()[:, None] * speed for place in torch.meshgrid(rows, columns, indexing="ij"))
    angle = torch.cat([down, right], -1)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., ::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)


def effective_rank(matrix: Tensor) -> Tensor:
    """Exponential of the entropy of the singular values' shares, of ``[..., M, N]`` (Roy and Vetterli, 2007)."""
    values = torch.linalg.svdvals(matrix)
    return torch.special.entr(values / values.sum(-1, keepdim=True)).sum(-1).exp()


@torch.no_grad()
def layer_ranks(models: list[Any], pictures: Tensor) -> tuple[float, float]:
    """Mean effective rank of the heads' states ``[D, D]``, and of the layers' outputs ``[N, width]``."""
    states, outputs = [], []
    for model in models:
        x = model.positions(model.patches(pictures).flatten(2).mT)
        for block in model.stack.blocks:
            layer: MultiHead = block.attention
            q, k, v = layer.project(block.before(x), block.before(x))
            if isinstance(layer, RankAugmented):
                k = k * (k @ q.mean(2)[..., None] * layer.head_width**-0.5).softmax(2)
            else:
                k = features.Elu1()(k, k)
            states.append(float(effective_rank(k.mT @ v).mean()))
            outputs.append(float(effective_rank(layer(block.before(x))).mean()))
            x = block(x)
    return statistics.fmean(states), statistics.fmean(outputs)
