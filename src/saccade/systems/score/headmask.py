"""HeadMask: in every training step some heads of the whole model are silent, so that none is relied on too much.

    random      the silent heads are drawn anew in each step
    important   those are silent that matter most to the batch's loss:  importance[h] = mean of |d loss / d factor[h]|,
                by a forward and a backward pass before those of the step
    out[h] = factor[h] * head[h],   factor 0 for ``share`` of all heads in training, 1 for the others and in use

The layer alone changes nothing: a model of such layers is trained with :func:`masked` around its task's loss.

Paper: Alleviating the Inequality of Attention Heads for Neural Machine Translation, arXiv:2009.09672
Code: none

Differs: nothing that we know; the paper's text was not at hand, so what its abstract leaves open is told from memory:
that silence is drawn over all layers and kinds of attention together, 18 of the 144 heads of a base transformer, that
outputs are not scaled up for it, and that importance is that of Michel et al. (arXiv:1905.10650). The claim divides
importance by its mean before it takes the variance, so that models of different loss can be compared.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...core import masks
from ...core.errors import SpecError
from ...core.spec import Attention
from ...nn import EncoderDecoder, MultiHead
from ...nn.backbones import Place
from ...nn.gates import best
from ..base import ClaimNumbers, LayerSystem, Promises
from ._routed_heads import Loss, held, importance, scarce
from ._translation import vocabulary

Kind = Literal["random", "important"]


class Silencer(nn.Module):
    """A gate that multiplies heads by ``factors`` ``[H]``, and does nothing while it has none."""

    def __init__(self, kind: Kind, share: float):
        super().__init__()
        self.kind, self.share = kind, share
        self.factors: Tensor | None = None

    def forward(self, out: Tensor, x: Tensor) -> Tensor:
        """``[B, H, N, D]``, each head times its factor."""
        return out if self.factors is None else out * self.factors[:, None, None]


class HeadMask(LayerSystem):
    """Settings: ``kind``, how the silent heads are chosen; ``share`` of all the model's heads; ``causal``."""

    slug = "headmask"
    title = "HeadMask (heads silent in training)"
    paper = "https://arxiv.org/abs/2009.09672"
    promises = Promises(unit_rows=True, hosts=())

    def __init__(self, kind: Kind = "random", share: float = 0.125, causal: bool = True):
        if kind not in ("random", "important") or not 0 < share < 1:
            raise SpecError(
                f'headmask: kind must be "random" or "important" and share in (0, 1); got {kind!r}, {share}'
            )
        self.kind, self.share, self.causal = kind, share, causal

    def layer(self, place: Place) -> nn.Module:
        """Multi-head attention whose heads can be silenced."""
        spec = Attention(mask=masks.Causal() if self.causal else masks.Full())
        gate = Silencer(self.kind, self.share)
        return MultiHead(spec, place.width, place.heads, kv_heads=place.kv_heads, positions=place.positions, gate=gate)

    def claim(self) -> ClaimNumbers:
        """Translation from 256 pairs with no, random and the important heads silent: importance, and held-out loss."""
        from ...study.trainer import Recipe, Task, compete, labelled

        def silent(kind: Kind) -> EncoderDecoder:
            full = HeadMask(kind, self.share, causal=False)
            return EncoderDecoder(vocabulary(), attention=full, decoder=HeadMask(kind, self.share), cross=full)

        models: dict[str, Callable[[], nn.Module]] = {
            "none": lambda: EncoderDecoder(vocabulary()),
            "random": lambda: silent("random"),
            "important": lambda: silent("important"),
        }
        unseen = held()
        result = compete(
            models, Task(scarce, masked(labelled), lambda: unseen, labelled), Recipe(steps=120, seeds=(0, 1))
        )
        uneven = {name: [_unevenness(model, unseen[0]) for model in result.models[name]] for name in models}
        spread = {name: statistics.fmean(values) for name, values in uneven.items()}
        excess = {kind: result.excess(kind, "none") for kind in ("random", "important")}
        return ClaimNumbers.decide(
            result.numbers()
            | {f"variance_{name}": [round(x, 4) for x in values] for name, values in uneven.items()}
            | {f"excess_{kind}": [round(x, 4) for x in each] for kind, each in excess.items()},
            f"The variance of the heads' importance is {spread['none']:.2f} of its mean squared; trained with random"
            f" heads silent {spread['random']:.2f}, with the important ones {spread['important']:.2f}. The loss on"
            f" other sentences differs by {excess['random'].mean:+.4f} (standard error {excess['random'].error:.4f})"
            f" and {excess['important'].mean:+.4f} ({excess['important'].error:.4f}) nats per word from"
            f" {result.mean('none'):.3f}.",
            more_equal_by_random=spread["random"] < spread["none"],
            more_equal_by_important=spread["important"] < spread["none"],
            better_by_random=excess["random"].mean < 0,
            better_by_important=excess["important"].mean < 0,
        )


def masked(plain: Loss) -> Loss:
    """A task's loss with some heads silent, in training; that of a model without such layers stays as it is."""

    def loss(model: nn.Module, batch: Any) -> Tensor:
        layers = [m for m in model.modules() if isinstance(m, MultiHead) and isinstance(m.gate, Silencer)]
        if not layers or not model.training:
            return plain(model, batch)
        counts = [layer.heads for layer in layers]
        gates: list[Any] = [layer.gate for layer in layers]
        likely = importance(model, batch, plain, layers) if gates[0].kind == "important" else torch.rand(sum(counts))
        silent = best(likely, max(1, round(gates[0].share * sum(counts))))
        try:
            for gate, part in zip(gates, silent.split(counts), strict=True):
                gate.factors = 1 - part
            return plain(model, batch)
        finally:
            for gate in gates:
                gate.factors = None

    return loss


def _unevenness(model: nn.Module, batch: Any) -> float:
    """Variance of the heads' importance over its mean squared."""
    from ...study.trainer import labelled

    found = importance(model, batch, labelled)
    return float((found / found.mean()).var(correction=0))
