"""Virtual adversarial training of attention: a model's answer must hold under the worst small shift of its own scores.

    p(r) = softmax of the logits with scores + r,       KL(p(0) || p(r)), p(0) as it stands: no labels are needed
    d = probe * random direction,   g = d KL(p(0) || p(d)) / d d
    r = size * g / |g|                                               Attention VAT
    r = size * s g / |s g|,  s[t] = sum over k of (a[t] - a[k])²     Attention iVAT: differences of the scores a lead it
    trained on   cross-entropy of the labelled + weight * mean over all, labelled or not, of KL(p(0) || p(r))

Paper: Making Attention Mechanisms More Robust and Interpretable with Virtual Adversarial Training, arXiv:2104.08763
Code: https://github.com/shunk031/attention-meets-perturbation (Attention AT, which this extends; it has no VAT)

Differs: of the paper only the abstract was at hand. The equations are those of virtual adversarial training
(arXiv:1704.03976, one power iteration, p(0) without a gradient) with the shift where Attention AT has it, and iVAT's
differences as in :mod:`.attention_at`, whose notes hold here too. ``size`` is Attention AT's, ``probe`` our choice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import cycle, islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.errors import SpecError
from ..base import ClaimNumbers, MethodSystem
from ._classifier import Classifier, cross_entropy, held, objective, opinions, right
from .attention_at import AttentionAT, Shifted, shifted_scores, spread, worst

LABELLED, UNLABELLED = 4, 40  # batches that the claim's classifiers learn from


class AttentionVAT(MethodSystem):
    """Settings: ``size`` of the shift, ``weight`` of its loss, ``interpretable`` (iVAT), ``probe`` of the first one."""

    slug = "attention-vat"
    title = "Virtual adversarial training of attention (Attention VAT, iVAT)"
    paper = "https://arxiv.org/abs/2104.08763"

    def __init__(self, size: float = 5.0, weight: float = 1.0, interpretable: bool = False, probe: float = 0.1):
        self.size, self.weight, self.interpretable, self.probe = size, weight, interpretable, probe

    def apply(self, model: nn.Module) -> AbstractContextManager[Smoother]:
        """Gives a :class:`Smoother` to train a model of transformers with; the model itself stays as it is."""
        if self.interpretable:
            raise SpecError("AttentionVAT(interpretable=True) reads the scores of a Classifier: leave it out here")
        return nullcontext(Smoother(model, self))

    def objective(self, model: Classifier, batch: tuple[Tensor, ...]) -> Tensor:
        """What a small classifier's training lowers, on (tokens, labels, tokens without labels)."""
        tokens, labels, *others = batch
        sizes = [len(tokens), *(len(other) for other in others)]
        parts = [self.divergence(model, x) * n for x, n in zip((tokens, *others), sizes, strict=True)]
        return cross_entropy(model, (tokens, labels)) + self.weight * torch.stack(parts).sum() / sum(sizes)

    def divergence(self, model: Classifier, tokens: Tensor) -> Tensor:
        """Mean KL divergence of the answers to tokens ``[B, N]`` from those under the worst shift."""
        with torch.no_grad():
            found = model.read(tokens)
        keep = tokens != 0

        def loss(shifts: Sequence[Tensor]) -> Tensor:
            return kl(found.logits, model.read(tokens, shifts[0]).logits)

        lead = spread(found.scores, keep) if self.interpretable else None
        return loss(virtual(loss, [keep.to(found.scores)], self.size, self.probe, lead))

    def claim(self) -> ClaimNumbers:
        """Classifiers of opinions with few labels: accuracy by training, where VAT sees sentences without labels."""
        from ...study.trainer import Recipe, Task, compete

        ivat = AttentionVAT(self.size, self.weight, True, self.probe)
        kinds = {
            "plain": None, "at": AttentionAT(self.size, self.weight).objective, "vat": self.objective,
            "ivat": ivat.objective,
        }  # fmt: skip
        models = {name: partial(Classifier, objective=kind) for name, kind in kinds.items()}
        task = Task(partly_labelled, objective, held, right, "accuracy")
        result = compete(models, task, Recipe(steps=120))
        above = {name: result.excess(name, "at") for name in ("vat", "ivat")}
        return ClaimNumbers.decide(
            result.numbers() | {f"above_at_{name}": [round(x, 4) for x in above[name]] for name in above},
            f"With few labels the accuracy is {result.mean('plain'):.1%} with plain training, {result.mean('at'):.1%}"
            f" with Attention AT, {result.mean('vat'):.1%} with Attention VAT and {result.mean('ivat'):.1%} with iVAT,"
            f" which also learn from ten times as many sentences without labels (standard errors of the differences"
            f" from AT {above['vat'].error:.1%} and {above['ivat'].error:.1%}).",
            vat_above_at=above["vat"].mean > 0,
            ivat_above_at=above["ivat"].mean > 0,
        )


def kl(logits: Tensor, other: Tensor) -> Tensor:
    """Mean KL divergence of the answers ``[..., classes]`` of ``other`` from those of ``logits``, in nats."""
    q, p = (x.flatten(0, -2).log_softmax(-1) for x in (other, logits))
    return F.kl_div(q, p, reduction="batchmean", log_target=True)


def virtual(
    loss: Shifted, like: Sequence[Tensor], size: float, probe: float, lead: Tensor | None = None
) -> list[Tensor]:
    """The shifts of ``size`` in each row that raise a divergence the most; ``probe`` first, for it is flat at zero.

    ``like``: by layer, 1 where a shift matters and 0 where there is padding.
    """
    probes = [probe * F.normalize(torch.randn_like(x) * x, dim=-1) for x in like]
    return worst(loss, probes, size, lead)


class Smoother:
    """Attention VAT of a model of transformers."""

    def __init__(self, model: Any, system: AttentionVAT):
        self.model, self.system = model, system

    def divergence(self, logits: Callable[[], Tensor], batch: int, length: int) -> Tensor:
        """How far ``logits()`` moves under the worst shifts of its scores, to be lowered: arguments as Adversary's."""
        with torch.no_grad():
            first = logits()
        run, zeros = shifted_scores(self.model, lambda: kl(first, logits()), batch, length)
        return run(virtual(run, [zero + 1 for zero in zeros], self.system.size, self.system.probe))


def partly_labelled(seed: int) -> Iterator[tuple[Tensor, ...]]:
    """The same few labelled batches over and over, each with one of ten times as many whose labels are not told."""
    source = opinions(seed)
    labelled, others = list(islice(source, LABELLED)), list(islice(source, UNLABELLED))
    for (tokens, labels, _), (unlabelled, *_) in zip(cycle(labelled), cycle(others)):
        yield tokens, labels, unlabelled
