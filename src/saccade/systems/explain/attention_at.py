"""Adversarial training of attention: a model learns from its loss under the worst small shift of its own scores.

    g = d loss(scores + r) / d r at r = 0,                           for each row of attention
    r = size * g / |g|                                               Attention AT
    r = size * s g / |s g|,  s[t] = sum over k of (a[t] - a[k])²     Attention iAT: differences of the scores a lead it
    trained on   loss(scores) + weight * loss(scores + r)            r is not differentiated

Paper: Attention Meets Perturbations: Robust and Interpretable Attention with Adversarial Training, arXiv:2009.12064
Code: https://github.com/shunk031/attention-meets-perturbation (amep/modules/attention_layer/bc/advt.py,
    amep/models/bc/at_advt.py)

Differs: of the paper only the abstract was at hand, so iAT is made after interpretable AT of texts (arXiv:1805.02917),
which it transfers: r[t] = alpha[t] . d[t] with d[t, k] = a[t] - a[k], and alpha along d loss / d alpha. That gives s
above if d has one length for the whole sentence; were each d[t] of length 1, iAT would be AT to the last digit. The
official code's iAT is neither: its differences (between sentences of a batch) multiply a zero, and its r is
-size * g / |g|, the shift that lowers the loss; its AT is as here. ``size`` has no default there. In a model of
transformers each layer, head and query has its own r of that size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.errors import SpecError
from ...core.scores import Bias
from ...core.spec import Attention
from ...hosts.handles import host_of, install
from ..base import ClaimNumbers, MethodSystem
from ._classifier import Classifier, few, held, objective, right
from ._importance import correlation

BATCHES = 12  # of sentences that the claim's classifiers learn from

Shifted = Callable[[Sequence[Tensor]], Tensor]
"""A loss, from what is added to the scores: one tensor for each layer."""


class AttentionAT(MethodSystem):
    """Settings: ``size`` of the shift, ``weight`` of its loss, ``interpretable`` (iAT; needs the model's scores)."""

    slug = "attention-at"
    title = "Adversarial training of attention (Attention AT, iAT)"
    paper = "https://arxiv.org/abs/2009.12064"
    code = "https://github.com/shunk031/attention-meets-perturbation"

    def __init__(self, size: float = 5.0, weight: float = 1.0, interpretable: bool = False):
        self.size, self.weight, self.interpretable = size, weight, interpretable

    def apply(self, model: nn.Module) -> AbstractContextManager[Adversary]:
        """Gives an :class:`Adversary` to train a model of transformers with; the model itself stays as it is."""
        if self.interpretable:
            raise SpecError("AttentionAT(interpretable=True) reads the scores of a Classifier: leave it out here")
        return nullcontext(Adversary(model, self))

    def objective(self, model: Classifier, batch: tuple[Tensor, ...]) -> Tensor:
        """What a small classifier's training lowers, on (tokens, labels, ...)."""
        tokens, labels, *_ = batch
        found = model.read(tokens)
        lead = spread(found.scores.detach(), tokens != 0) if self.interpretable else None

        def loss(shifts: Sequence[Tensor]) -> Tensor:
            return F.cross_entropy(model.read(tokens, shifts[0]).logits, labels)

        shifts = worst(loss, [torch.zeros_like(found.scores)], self.size, lead)
        return F.cross_entropy(found.logits, labels) + self.weight * loss(shifts)

    def claim(self) -> ClaimNumbers:
        """Classifiers of opinions: accuracy, and how attention agrees with gradients, by training."""
        from ...study.trainer import Recipe, Task, compete

        iat = AttentionAT(self.size, self.weight, interpretable=True)
        kinds = {"plain": None, "at": self.objective, "iat": iat.objective}
        models = {name: partial(Classifier, objective=kind) for name, kind in kinds.items()}
        task = Task(partial(few, BATCHES), objective, held, right, "accuracy")
        result = compete(models, task, Recipe(steps=150))
        agree = {name: [mean_correlation(model) for model in result.models[name]] for name in models}
        mean = {name: sum(found) / len(found) for name, found in agree.items()}
        return ClaimNumbers.decide(
            result.numbers()
            | {f"correlation_{name}": [round(x, 3) for x in found] for name, found in agree.items()}
            | {
                f"accuracy_excess_{name}": [round(x, 4) for x in result.excess(name, "plain")] for name in ("at", "iat")
            },
            f"Accuracy {result.mean('plain'):.1%} with plain training, {result.mean('at'):.1%} with AT and"
            f" {result.mean('iat'):.1%} with iAT of the attention; attention correlates with gradient importance by"
            f" {mean['plain']:.2f}, {mean['at']:.2f} and {mean['iat']:.2f}.",
            at_is_more_accurate=result.mean("at") > result.mean("plain"),
            iat_is_more_accurate=result.mean("iat") > result.mean("plain"),
            at_agrees_more=mean["at"] > mean["plain"],
            iat_agrees_more=mean["iat"] > mean["plain"],
        )


def worst(loss: Shifted, zeros: Sequence[Tensor], size: float, lead: Tensor | None = None) -> list[Tensor]:
    """The shifts of ``size`` in each row that raise a loss the most, to first order; ``lead`` weighs the gradient."""
    starts = [zero.detach().requires_grad_() for zero in zeros]
    with torch.enable_grad():
        gradients = torch.autograd.grad(loss(starts), starts)
    return [size * F.normalize(g if lead is None else lead * g, dim=-1) for g in gradients]


def spread(scores: Tensor, keep: Tensor) -> Tensor:
    """``sum over k of (a[t] - a[k])²`` of scores ``[B, N]``, over the tokens that are kept."""
    squares = (scores[:, :, None] - scores[:, None]).square()
    return (squares * (keep[:, :, None] & keep[:, None])).sum(-1)


def mean_correlation(model: Classifier) -> float:
    """Of the held sentences, see :func:`._classifier.correlation`."""
    return float(torch.stack([correlation(model.eval(), batch[0]) for batch in held()]).mean())


class Adversary:
    """Attention AT of a model of transformers: one shift ``[B, H, N, M]`` for each of its layers."""

    def __init__(self, model: Any, system: AttentionAT):
        self.model, self.system = model, system

    def loss(self, loss: Callable[[], Tensor], batch: int, length: int) -> Tensor:
        """``loss()`` and the same under its worst shifts, to be lowered.

        Args:
            loss: runs the model on ``batch`` sequences of ``length`` tokens, without a cache; the same each time.
        """
        run, zeros = shifted_scores(self.model, loss, batch, length)
        return loss() + self.system.weight * run(worst(run, zeros, self.system.size))


def shifted_scores(model: Any, loss: Callable[[], Tensor], batch: int, length: int) -> tuple[Shifted, list[Tensor]]:
    """The loss of a model of transformers as a function of what is added to its scores, and zeros of their shapes."""
    sites = host_of(model).sites()
    places = {site.layer: i for i, site in enumerate(sites)}
    like = next(model.parameters())

    def shifted(shifts: Sequence[Tensor]) -> Tensor:
        with install(model, lambda layer, heads: Attention([Bias(shifts[places[layer]])])):
            return loss()

    return shifted, [like.new_zeros(batch, site.heads, length, length) for site in sites]
