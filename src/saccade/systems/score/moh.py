"""Mixture-of-head attention: some heads always, of the others the best few for each token, each weighed by a gate.

    p       = softmax(x Wr)                                  of the routed heads
    stage   = 2 softmax(x Wh)
    gate[h] = stage[0] * shared * softmax(x Ws)[h]           of a shared head (one alone: stage[0])
              stage[1] * keep * p[h] / (sum of kept p)       of a routed head whose p is among the ``keep`` greatest
              0                                              of the others
    y       = sum over heads of gate[h] head[h] Wo[h]
    loss    = the task's + 0.01 * mean over layers of  routed * sum over h of mean(p[h]) mean(h is kept)

A trained model becomes one by :func:`saccade.hosts.convert.to_routed`, whose router has no parameters.

Paper: MoH: Multi-Head Attention as Mixture-of-Head Attention, arXiv:2410.11842
Code: https://github.com/SkyworkAI/MoH (MoH-ViT/attention.py, and engine.py for the loss; the conversion is
    MoH-LLaMA3/Inference_code/modeling_llama.py)

Differs: TransNeXt's attention around the gates (cosine scores, biases) is left out. Every head is computed and those
that are not kept get the factor 0, as in the official code, so nothing is faster. How many heads are shared is a choice
of each official model (a quarter to all of those in use); a quarter of all is ours.
"""

from __future__ import annotations

import statistics
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ...core import masks
from ...core.spec import Attention
from ...nn import MultiHead
from ...nn.backbones import Place
from ...nn.gates import HeadRouter, balance
from ..base import ClaimNumbers, LayerSystem, Promises
from ._routed_heads import Loss, contest

BALANCE = 0.01  # weight of the load-balancing loss
RECOVERED = 0.95  # share of the original's performance that the paper's converted model regains soon


class MoH(LayerSystem):
    """Settings: ``active``, the share of the heads that a token uses; ``shared``, that it always uses; ``causal``."""

    slug = "moh"
    title = "Mixture-of-head attention (MoH)"
    paper = "https://arxiv.org/abs/2410.11842"
    code = "https://github.com/SkyworkAI/MoH"
    promises = Promises(hosts=())

    def __init__(self, active: float = 0.75, shared: float = 0.25, causal: bool = True):
        self.active, self.shared, self.causal = active, shared, causal

    def layer(self, place: Place) -> nn.Module:
        """Multi-head attention with a router. Raises: SpecError if no routed head would be used, or too many."""
        shared = round(self.shared * place.heads)
        router = HeadRouter(place.width, place.heads, round(self.active * place.heads) - shared, shared)
        spec = Attention(mask=masks.Causal() if self.causal else masks.Full())
        return MultiHead(
            spec, place.width, place.heads, kv_heads=place.kv_heads, positions=place.positions, gate=router
        )

    def claim(self) -> ClaimNumbers:
        """Small language models with all, 75% and 50% of the heads; and the embedded one, converted and tuned."""
        from ...study.trainer import Setup, batches

        setup = Setup(layers=3, heads=8, steps=100, seeds=(0, 1))
        result = contest({"mha": None, "moh_75": MoH(0.75), "moh_50": MoH(0.5)}, setup, balanced)
        tokens = next(batches(setup.validation, setup, 20_000))
        used = {name: _used(result.models[name][0], tokens) for name in ("moh_75", "moh_50")}
        excess = {name: result.excess(name, "mha") for name in used}
        right = _converted()
        return ClaimNumbers.decide(
            result.numbers()
            | {f"used_{name}": round(share, 4) for name, share in used.items()}
            | {f"excess_{name}": [round(x, 4) for x in each] for name, each in excess.items()}
            | {f"accuracy_{name}": round(share, 4) for name, share in right.items()},
            f"Of {setup.heads} heads {used['moh_75']:.0%} used, the validation loss differs by"
            f" {excess['moh_75'].mean:+.4f} nats per byte (standard error {excess['moh_75'].error:.4f}) from"
            f" {result.mean('mha'):.4f} of multi-head attention, {used['moh_50']:.0%} used by"
            f" {excess['moh_50'].mean:+.4f} ({excess['moh_50'].error:.4f}). The embedded model tells"
            f" {right['original']:.1%} of next bytes, routed {right['routed']:.1%}, with one key head instead of two"
            f" {right['shared']:.1%}; after a short tuning {right['original_tuned']:.1%}, {right['routed_tuned']:.1%},"
            f" {right['shared_tuned']:.1%}.",
            as_good_with_75_percent=excess["moh_75"].mean <= 0,
            as_good_with_50_percent=excess["moh_50"].mean <= 0,
            conversion_recovers=right["routed_tuned"] >= RECOVERED * right["original"],
        )


def balanced(plain: Loss) -> Loss:
    """A task's loss, and in training the load-balancing loss."""
    return lambda model, batch: plain(model, batch) + BALANCE * balance(model)


@torch.no_grad()
def _used(model: nn.Module, tokens: Tensor) -> float:
    """Share of the heads, over tokens and layers, whose gate is not zero."""
    shares: list[float] = []

    def look(router: nn.Module, given: Any, out: Tensor) -> None:
        shares.append(float((out != 0).any(-1).float().mean()))

    hooks = [m.register_forward_hook(look) for m in model.modules() if isinstance(m, HeadRouter)]
    model(tokens)
    for hook in hooks:
        hook.remove()
    return statistics.fmean(shares)


class _Logits(nn.Module):
    """A model of transformers as a function from tokens to logits."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens, use_cache=False).logits


def _converted() -> dict[str, float]:
    """Next-byte accuracy of the embedded model, and of it converted, before and after the same short tuning.

    The text is that of no training so far: what tuning gains from it, the original gains too.
    """
    from ...hosts.convert import to_routed, to_shared
    from ...study.probes import embedded
    from ...study.trainer import Recipe, Setup, accuracy, compete, judge, language, next_token

    def right(model: nn.Module, tokens: Tensor) -> Tensor:
        return accuracy(model, (tokens[:, :-1], tokens[:, 1:]))

    task = replace(language(Setup()), loss=balanced(next_token), measure=right, score="accuracy")
    models = {
        "original": lambda: _Logits(embedded()),
        "routed": lambda: _Logits(to_routed(embedded())),
        "shared": lambda: _Logits(to_shared(embedded())),
    }
    tuned = compete(models, task, Recipe(steps=30, lr=3e-4, seeds=(0,)))
    before = {name: judge(make(), task) for name, make in models.items()}
    return before | {f"{name}_tuned": tuned.mean(name) for name in models}
