"""Hedgehog: linear attention whose feature maps learn to give the weights of softmax attention.

    f_q(x) = [softmax(x W_q[h]), softmax(-x W_q[h])],   f_k the same with W_k[h]
    w[i, j] = f_q(q[i]) . f_k(k[j]) / sum over j <= i of the same

    distill:  minimise  -sum over j <= i of  softmax(scale q[i] . k[j]) log w[i, j],   the model as it is

Softmax maps are spiky (of low entropy) and monotone in ``q . k``; these are learned to be. A model is converted in two
steps: the maps are distilled layer by layer from its own queries and keys, then the whole is tuned on text.

Paper: The Hedgehog & the Porcupine: Expressive Linear Attentions with Softmax Mimicry, arXiv:2402.04347
Code: https://github.com/HazyResearch/lolcats (src/model/feature_map.py: SoftmaxDim, FeatureMapMLP;
    src/model/linear_attention/linear_attention.py: LolcatsLinearAttention, quadratic_attention)

Differs: the maps start as the identity and are as wide as a head (the paper; LoLCATs' configuration draws them by
Kaiming's rule and halves the width). LoLCATs adds a thousand times the squared error of the outputs to the loss and
tunes with LoRA; here the loss is the paper's and all weights are tuned, and for few steps: rates are higher and fall to
zero (distillation 3e-2; LoLCATs 1e-2, less where the loss stalls). fla's Hedgehog is another function
(:class:`saccade.linear.features.SoftmaxHedgehog`, ``joint=True``). In a converted model of transformers the cache still
holds keys; what the tokens before left is summed from them. Layers of :mod:`saccade.nn` decode with the state alone.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.errors import Unsupported
from ...core.linear import LinearAttention, features, linear_attention, linear_weights
from ...hosts.replaced import Read, read, replaced
from ...nn.backbones import Place
from ..base import ClaimNumbers, LayerSystem, Promises

# Of the claim: tokens of a text (as many as a head of the embedded model has features: more, and softmax's sharp rows
# have a higher rank than these weights can have), texts of a step, steps.
SIZE, BATCH, DISTILL, TUNE = 96, 5, 100, 150
RECOVERED = 0.99  # of the score of the model with softmax attention, tuned on the same texts


class Hedgehog(LayerSystem):
    """Settings: ``causal``."""

    slug = "hedgehog"
    title = "Hedgehog (softmax mimicry)"
    paper = "https://arxiv.org/abs/2402.04347"
    code = "https://github.com/HazyResearch/lolcats"
    promises = Promises(exponent=1.0, unit_rows=True)

    def __init__(self, causal: bool = True):
        self.causal = causal

    def program(self, heads: int, width: int) -> LinearAttention:
        """Maps of heads of this width, the identity at first."""
        maps = [features.SoftmaxHedgehog(nn.Parameter(torch.eye(width).repeat(heads, 1, 1))) for _ in range(2)]
        return LinearAttention(features.Pair(*maps), normalize=True, causal=self.causal, eps=1e-12)

    def layer(self, place: Place) -> nn.Module:
        """The program, for a model that is trained from scratch."""
        return self.program(place.heads, place.width // place.heads)

    def distill(self, model: Any, texts: Sequence[Tensor], rate: float = 3e-2) -> nn.ModuleList:
        """Programs of a causal model's layers, after a step on each of the texts ``[B, N]``; the rate falls to zero."""
        layers = read(model, texts[0][:, :2])
        made = nn.ModuleList([self.program(layer.q.shape[1], layer.q.shape[3]) for layer in layers])
        optimizer = torch.optim.AdamW(made.parameters(), lr=rate, weight_decay=0.0)
        for step, tokens in enumerate(texts):
            _set_rate(optimizer, rate * (1 - step / len(texts)))
            optimizer.zero_grad()
            for spec, layer in zip(made, read(model, tokens), strict=True):
                _mimicry(spec, layer).backward()
            optimizer.step()
        return made

    @contextmanager
    def apply(self, model: Any, made: nn.ModuleList) -> Iterator[None]:
        """The model attends with these programs until the context is left."""

        def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **given: Any) -> tuple[Tensor, None]:
            if mask is not None and (mask.shape[-2] > 1 or not bool(mask.all())):
                raise Unsupported("Hedgehog reads whole texts of one length without padding, then token by token")
            spec, state, past = made[module.layer_idx], None, k.shape[2] - q.shape[2]
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))  # each query head has its map
            if past:
                old_k, old_v = k[:, :, :past], v[:, :, :past]
                state = linear_attention(old_k, old_k, old_v, spec, return_state=True)[1]
            out = linear_attention(q, k[:, :, past:], v[:, :, past:], spec, state=state)
            return out.transpose(1, 2).contiguous(), None

        with replaced(model, attend):
            yield

    def claim(self) -> ClaimNumbers:
        """The embedded model converted: what it gets right of what it got right, and the shape of its weights."""
        from ...study.probes import embedded
        from ...worlds.text import heldout, text

        model, cut = embedded(), len(heldout()) * 3 // 4
        learn, held = (
            [torch.stack([e.tokens for e in islice(rows, BATCH)]) for _ in range(count)]
            for rows, count in (
                (text(SIZE, "hedgehog", source=heldout()[:cut]), DISTILL + TUNE),
                (text(SIZE, "hedgehog", source=heldout()[cut:]), 16),
            )
        )
        made = self.distill(model, learn[:DISTILL])
        shape = weight_shapes(made, [layer for tokens in held[:2] for layer in read(model, tokens)])
        with self.apply(model, made):
            right = {"distilled": accuracy(model, held)}
        right["dense"] = accuracy(model, held)
        tuned = copy.deepcopy(model)
        tune(tuned, [], learn[DISTILL:])
        right["dense tuned"] = accuracy(tuned, held)
        with self.apply(model, made):
            tune(model, list(made.parameters()), learn[DISTILL:])
            right["converted"] = accuracy(model, held)
        recovered = right["converted"] / right["dense tuned"]
        return ClaimNumbers.decide(
            {f"accuracy {name}": round(x, 4) for name, x in right.items()}
            | {"recovered": round(recovered, 4)}
            | {name: round(x, 4) for name, x in shape.items()},
            f"Converted by {DISTILL} steps of distillation and {TUNE} of tuning, the embedded model says"
            f" {right['converted']:.1%} of unseen bytes right, {recovered:.1%} of what it says with softmax attention"
            f" tuned on the same texts ({right['distilled']:.1%} before tuning). Entropy of its weights"
            f" {shape['entropy_hedgehog']:.2f} nats (softmax {shape['entropy_softmax']:.2f}, elu + 1"
            f" {shape['entropy_elu']:.2f}); of two keys it orders {shape['monotone_hedgehog']:.0%} as their dot"
            f" products do (elu + 1 {shape['monotone_elu']:.0%}).",
            quality_is_recovered=recovered >= RECOVERED,
            lower_entropy_than_elu=shape["entropy_hedgehog"] < shape["entropy_elu"],
            more_monotone_than_elu=shape["monotone_hedgehog"] > shape["monotone_elu"],
        )


def _truth(layer: Read) -> Tensor:
    """Softmax weights ``[B, H, N, N]`` of a causal layer."""
    k = layer.k.repeat_interleave(layer.q.shape[1] // layer.k.shape[1], 1)
    later = torch.ones(layer.q.shape[2], layer.q.shape[2], dtype=torch.bool).triu(1)
    return (layer.q @ k.mT * layer.scale).masked_fill(later, -torch.inf).softmax(-1)


def _mimicry(spec: nn.Module, layer: Read) -> Tensor:
    """Cross entropy from the softmax weights to the program's, the mean over rows, in nats."""
    w = linear_weights(layer.q, layer.k, spec)  # type: ignore[arg-type]
    return -(_truth(layer) * w.clamp(min=1e-12).log()).sum(-1).mean()


def tune(model: Any, more: list[nn.Parameter], texts: Sequence[Tensor], rate: float = 2e-3) -> None:
    """Train a model, and more parameters, to say the next byte, with a step on each of the texts ``[B, N]``.

    The rate rises for ten steps and falls to zero.
    """
    parameters = [*model.parameters(), *more]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    for step, tokens in enumerate(texts):
        _set_rate(optimizer, rate * min((step + 1) / 10, 1 - step / len(texts)))
        optimizer.zero_grad()
        logits = model(tokens, use_cache=False).logits
        F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


@torch.no_grad()
def accuracy(model: Any, texts: Sequence[Tensor]) -> float:
    """Share of next bytes that the model likes best."""
    return statistics.fmean(
        float((model(t, use_cache=False).logits[:, :-1].argmax(-1) == t[:, 1:]).float().mean()) for t in texts
    )


@torch.no_grad()
def weight_shapes(made: nn.ModuleList, layers: Sequence[Read]) -> dict[str, float]:
    """Mean entropy of the last row's weights, and how many of its pairs of keys they order as the dot products do."""
    numbers: dict[str, list[float]] = {}
    elu = LinearAttention(features.Elu1(), normalize=True)
    for number, layer in enumerate(layers):
        truth = _truth(layer)[..., -1, :]
        order = (truth[..., :, None] - truth[..., None, :]).sign()
        specs = {"hedgehog": made[number % len(made)], "elu": elu}
        maps = {name: linear_weights(layer.q, layer.k, spec)[..., -1, :] for name, spec in specs.items()}  # type: ignore[arg-type]
        for name, w in {"softmax": truth, **maps}.items():
            numbers.setdefault(f"entropy_{name}", []).append(float(torch.special.entr(w).sum(-1).mean()))
            same = (w[..., :, None] - w[..., None, :]).sign() * order
            numbers.setdefault(f"monotone_{name}", []).append(float((same > 0).float().sum() / (order != 0).sum()))
    return {name: statistics.fmean(x) for name, x in numbers.items()}
