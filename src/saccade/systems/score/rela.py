"""Rectified linear attention: a ReLU in the softmax's place, so weights can be zero, and all of a row's at once.

    w[i, j] = relu(q[i] . k[j] / sqrt(D))
    o = the heads' w v side by side                               [B, N, H D]
    y = (scale * o / rms(o) * sigmoid(gate * o)) Wo

A row sums to nothing in particular; the norm over all heads together keeps the output's size, and the gate, one number
per coordinate, lets it be small (ReLA-g of the paper).

Paper: Sparse Attention with Linear Units, arXiv:2104.07012
Code: https://github.com/bzhangGo/zero (modules/rela.py: dot_attention, gated_rms_norm; eps 1e-8, scale of ones, gate
    uniform in +- sqrt(3 / (H D)): unit-scaled uniform, taken to be the default)

Differs: no biases on the projections. The gate's first numbers are drawn from the layer's number, so that models
compared start equal.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...core import masks, normalizers
from ...core.attend import weights
from ...core.spec import Attention
from ...nn import EncoderDecoder, MultiHead
from ...nn.attention import join, padded
from ...nn.backbones import Block, Place
from ..base import ClaimNumbers, LayerSystem, Promises
from ._translation import HELD, pairs, told, vocabulary

if TYPE_CHECKING:
    from ...worlds.translation import Translation

EPS = 1e-8
SPARSE = 0.5  # share of the weights that "high sparsity" must leave zero


class GatedNorm(nn.Module):
    """``scale * x / rms(x) * sigmoid(gate * x)``, over ``[..., width]``."""

    def __init__(self, width: int, seed: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))
        drawn = torch.rand(width, generator=torch.Generator().manual_seed(seed))
        self.gate = nn.Parameter((2 * drawn - 1) * (3 / width) ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        """The same shape."""
        return self.scale * x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * torch.sigmoid(self.gate * x)


class Rectified(MultiHead):
    """Multi-head attention with a gated norm before the output projection."""

    def __init__(self, spec: nn.Module, place: Place):
        super().__init__(spec, place.width, place.heads, positions=place.positions)
        self.norm = GatedNorm(place.width, place.index)

    def merge(self, out: Tensor, x: Tensor) -> Tensor:
        """Norm and gate over all heads, then the projection."""
        return self.out(self.norm(join(out)))


class ReLA(LayerSystem):
    """Settings: ``causal``."""

    slug = "rela"
    title = "Rectified linear attention (ReLA)"
    paper = "https://arxiv.org/abs/2104.07012"
    code = "https://github.com/bzhangGo/zero"
    promises = Promises(hosts=())

    def __init__(self, causal: bool = True):
        self.causal = causal

    def layer(self, place: Place) -> nn.Module:
        """Multi-head attention with ReLU and the gated norm."""
        mask = masks.Causal() if self.causal else masks.Full()
        return Rectified(Attention(mask=mask, normalizer=normalizers.ReLU()), place)

    def claim(self) -> ClaimNumbers:
        """Translation between small languages: zeros, empty rows and word alignment of cross-attention."""
        from ...study.trainer import Recipe, Task, compete, labelled

        full = ReLA(causal=False)
        models: dict[str, Callable[[], nn.Module]] = {
            "softmax": lambda: EncoderDecoder(vocabulary()),
            "rela": lambda: EncoderDecoder(vocabulary(), attention=full, decoder=self, cross=full),
        }
        held = next(pairs(HELD))
        task = Task(lambda seed: map(told, pairs(seed)), labelled, lambda: [told(held)])
        recipe = Recipe(steps=300, seeds=(0, 1))
        result = compete(models, task, recipe)
        seen = {name: [_look(model, held) for model in result.models[name]] for name in models}
        zeros, empty, wrong = ({n: statistics.fmean(x[i] for x in seen[n]) for n in models} for i in range(3))
        return ClaimNumbers.decide(
            result.numbers()
            | {f"{n}_{what}": round(x[n], 4) for n in models for what, x in
               {"zeros": zeros, "empty_rows": empty, "alignment_error": wrong}.items()},
            f"After {recipe.steps} steps {zeros['rela']:.0%} of the cross-attention's weights are zero and"
            f" {empty['rela']:.1%} of its rows empty (softmax: {zeros['softmax']:.0%}, {empty['softmax']:.0%}); the"
            f" word it looks at most is wrong in {wrong['rela']:.1%} of cases, softmax's in {wrong['softmax']:.1%}."
            f" Loss {result.mean('rela'):.3f} against {result.mean('softmax'):.3f}.",
            sparse=zeros["rela"] >= SPARSE,
            attends_to_nothing=empty["rela"] > 0,
            better_alignment=wrong["rela"] < wrong["softmax"],
        )  # fmt: skip


@torch.no_grad()
def _look(model: nn.Module, given: Translation) -> tuple[float, float, float]:
    """Share of zero weights, share of empty rows, and alignment error in the layer where it is least."""
    source, target, keep, labels = told(given)
    found: list[Tensor] = []
    blocks = [block for block in model.modules() if isinstance(block, Block) and isinstance(block.cross, MultiHead)]

    def watch(cross: Any, given: tuple[Tensor, ...]) -> None:
        q, k, _ = cross.placed(*given)
        found.append(weights(q, k, padded(cross.spec, keep)))

    hooks = [block.cross.register_forward_pre_hook(watch) for block in blocks if block.cross is not None]
    model(source, target, keep)
    for hook in hooks:
        hook.remove()
    rows = (labels != -100)[:, None].expand(found[0].shape[:3])
    zeros = statistics.fmean(float((w == 0)[rows[..., None] & keep[:, None, None]].float().mean()) for w in found)
    empty = statistics.fmean(float((w == 0).all(-1)[rows].float().mean()) for w in found)
    gold = given.alignment[:, 1:]  # a row of the target predicts the word after it
    asked = gold.any(-1)
    hits = [gold.gather(-1, w.mean(1).argmax(-1, keepdim=True))[..., 0][asked].float().mean() for w in found]
    return zeros, empty, 1 - float(max(hits))
