"""Hedgehog: linear attention whose feature maps learn to give the weights of softmax attention.

    f_q(x) = [softmax(x W_q[h]), softmax(-x W_q[h])],   f_k the same with W_k[h]
    w[i, j] = f_q(q[i]) . f_k(k[j]) / sum over j <= i of the same

    distill:  minimise  -sum over j <= i of  softmax(scale q[i] . k[j]) log w[i, j],   the model as it is

Softmax maps are spiky (of low entropy) and monotone in ``q . k``; these are learned to be. A model is converted in two
steps: the maps are distilled layer by layer from its own queries and keys, then the whole is tuned on text.

Paper: The Hedgehog & the Porcupine: Expressive Linear Attentions with Softmax Mimicry, arXiv:2402.04347
Code: https://github.com/HazyResearch/lolcats (src/model/feature_map.py: SoftmaxDim, FeatureMapMLP;
    src/model/linear_attention/linear_attention.py: LolcatsLinearAttention, quadratic_attention)

Differs: the maps are ``expand`` times as wide as a head: the identity (the paper's, and all with ``expand=1``), then
random rotations (LoLCATs draws by Kaiming's rule and halves the width): a head of the embedded model has 48 channels,
too few to tell the places of a text apart. LoLCATs adds a thousand times the squared error of the outputs to the loss
and tunes with LoRA; here the loss is the paper's, all weights are tuned, and rates fall to zero. fla's Hedgehog is
another function (:class:`saccade.linear.features.SoftmaxHedgehog`, ``joint=True``). In a converted model of
transformers the cache still holds keys, and beside them what they left behind.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.linear import LinearAttention, features
from ...hosts.handles import Handle, install
from ...hosts.replaced import read
from ...nn.backbones import Place
from ...worlds.text import Example
from ..base import ClaimNumbers, LayerSystem, Promises
from ._mimicry import mimicry, weight_shapes

# Of the claim: tokens of a text, texts of a step of distillation and of tuning, steps of each.
SIZE, SHOWN, READ, DISTILL, TUNE = 96, 8, 16, 2000, 1000


class Hedgehog(LayerSystem):
    """Settings: ``causal``; ``expand``, the width of the maps in widths of a head."""

    slug = "hedgehog"
    title = "Hedgehog (softmax mimicry)"
    paper = "https://arxiv.org/abs/2402.04347"
    code = "https://github.com/HazyResearch/lolcats"
    promises = Promises(exponent=1.0, unit_rows=True)

    def __init__(self, causal: bool = True, expand: int = 1):
        self.causal, self.expand = causal, expand

    def program(self, heads: int, width: int) -> LinearAttention:
        """Maps for heads of this width, ``[heads, width, expand * width]``: rotations, the first of them none."""
        turns = [torch.eye(width), *(torch.linalg.qr(torch.randn(width, width))[0] for _ in range(1, self.expand))]
        start = torch.cat(turns, 1).repeat(heads, 1, 1)
        maps = [features.SoftmaxHedgehog(nn.Parameter(start.clone())) for _ in range(2)]
        return LinearAttention(features.Pair(*maps), normalize=True, causal=self.causal, eps=1e-12)

    def layer(self, place: Place) -> nn.Module:
        """The program, for a model that is trained from scratch."""
        return self.program(place.heads, place.width // place.heads)

    def distill(self, model: Any, texts: Sequence[Tensor], rate: float = 1.5e-2) -> nn.ModuleList:
        """Programs of a causal model's layers, after a step on each of the texts ``[B, N]``; the rate falls to zero."""
        from ...study.trainer import train

        layers, rows = read(model, texts[0][:, :2]), iter(texts)
        made = nn.ModuleList([self.program(layer.q.shape[1], layer.q.shape[3]) for layer in layers])

        def loss() -> Tensor:
            return torch.stack([mimicry(*pair) for pair in zip(made, read(model, next(rows)), strict=True)]).sum()

        train(made, loss, len(texts), rate, last=0.0)
        return made

    def apply(self, model: Any, made: nn.ModuleList) -> Handle:
        """The model attends with these programs until the handle is closed."""
        return install(model, lambda layer, heads: made[layer])  # type: ignore[arg-type, return-value]

    def claim(self) -> ClaimNumbers:
        """The embedded model converted: what it gets right of what it got right, and the shape of its weights."""
        from ...study.probes import embedded
        from ...worlds.text import heldout, manual, text

        torch.manual_seed(0)
        system, model, cut = Hedgehog(expand=4), embedded(), len(heldout()) * 3 // 4
        read_by, unseen = (text(SIZE, "hedgehog", source=s) for s in (heldout()[:cut] + manual(), heldout()[cut:]))
        shown = [_batch(read_by, SHOWN) for _ in range(DISTILL)]
        learn = [_batch(read_by, READ) for _ in range(TUNE)]
        held = _batch(unseen, 12 * READ)
        scores = {"dense": score(model, held)}
        tuned = copy.deepcopy(model)
        tune(tuned, nn.ModuleList(), learn)
        scores["dense tuned"] = score(tuned, held)
        made = system.distill(model, shown)
        shape = weight_shapes(made, read(model, held[:READ]))
        with system.apply(model, made):
            scores["distilled"] = score(model, held)
            tune(model, made, learn)
            scores["converted"] = score(model, held)
        right, loss = ({name: found[i] for name, found in scores.items()} for i in (0, 1))
        recovered = right["converted"] / right["dense tuned"]
        return ClaimNumbers.decide(
            {f"accuracy {name}": round(x, 4) for name, x in right.items()}
            | {f"loss {name}": round(x, 4) for name, x in loss.items()}
            | {name: round(x, 4) for name, x in ({"recovered": recovered} | shape).items()},
            f"Converted by {DISTILL} steps of distillation and {TUNE} of tuning, the embedded model says"
            f" {right['converted']:.1%} of unseen bytes right, {recovered:.1%} of what it says with softmax attention"
            f" tuned on the same texts ({right['dense tuned']:.1%}; untuned {right['dense']:.1%}, distilled alone"
            f" {right['distilled']:.1%}), at {loss['converted']:.3f} nats a byte ({loss['dense tuned']:.3f}; untuned"
            f" {loss['dense']:.3f}). Texts of {SIZE} bytes, {system.expand} times the paper's features. Entropy of its"
            f" weights {shape['entropy_hedgehog']:.2f} nats (softmax {shape['entropy_softmax']:.2f}, elu + 1"
            f" {shape['entropy_elu']:.2f}); of two keys it orders {shape['monotone_hedgehog']:.0%} as their dot"
            f" products do (elu + 1 {shape['monotone_elu']:.0%}).",
            quality_is_recovered=recovered >= 0.99,
            lower_entropy_than_elu=shape["entropy_hedgehog"] < shape["entropy_elu"],
            more_monotone_than_elu=shape["monotone_hedgehog"] > shape["monotone_elu"],
        )


def _batch(examples: Iterator[Example], size: int) -> Tensor:
    return torch.stack([example.tokens for example in islice(examples, size)])


def tune(model: Any, maps: nn.ModuleList, texts: Sequence[Tensor], rate: float = 1e-3) -> None:
    """Train a model, and maps, to say the next byte, a step on each of the texts ``[B, N]``; the rate falls to zero."""
    from ...study.trainer import train

    rows = iter(texts)

    def loss() -> Tensor:
        tokens = next(rows)
        said = model(tokens, use_cache=False).logits[:, :-1]
        return F.cross_entropy(said.flatten(0, 1), tokens[:, 1:].flatten())

    train(nn.ModuleList([model, maps]), loss, len(texts), rate, last=0.0)


@torch.no_grad()
def score(model: Any, texts: Tensor) -> tuple[float, float]:
    """Of texts ``[S, N]``: the share of next bytes that the model likes best, and its loss in nats a byte."""
    said = torch.cat([model(some, use_cache=False).logits[:, :-1] for some in texts.split(READ)]).flatten(0, 1)
    right = texts[:, 1:].flatten()
    return float((said.argmax(-1) == right).double().mean()), float(F.cross_entropy(said, right))
