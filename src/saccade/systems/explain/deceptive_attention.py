"""Deceptive attention: a penalty teaches a model to use words that its attention says it does not look at.

    mass = sum over the impermissible tokens j of w[j]
    penalty = -weight * log(1 - mass)                    of one attention
    penalty = -weight * mean over the heads of log(1 - mass of a head),   or the worst head's ("max")
    trained on   cross-entropy + penalty

What the impermissible tokens say reaches the answer by way of other tokens' states.

Paper: Learning to Deceive with Attention-Based Explanations, arXiv:1909.07913
Code: https://github.com/danishpruthi/deceptive-attention (src/classification_tasks/main.py, calc_hammer_loss; of BERT:
    src/classification_tasks/pytorch-pretrained-BERT/run_classifier.py, attention_regularization_loss)

Differs: the official code trains one sentence at a time and so takes the penalty's mean over them, as here over a
batch; in BERT "max" is the worst head of the whole batch, here too. Its BERT's query is [CLS], the first token; here it
is ``query``, by default the last, from which a causal model answers. A model of transformers is penalized in its last
layer, as there; tokens that are no text are not told apart from permissible ones (a mass of 1 gives infinity: give
each text some permissible token). Sequence to sequence, where the permissible token is the aligned one, is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...core.errors import SpecError
from ...core.stats import RegionMass
from ...hosts.handles import Watching, watch
from ..base import ClaimNumbers, MethodSystem
from ._classifier import MASK, Classifier, cross_entropy, held, objective, opinions, right

HIDDEN = 0.01  # mass: most of the paper's deceptive models give the impermissible tokens less than one hundredth
COST = 0.03  # accuracy that deception may cost
NEEDED = 0.1  # by how much it must be above that of a model that cannot see the impermissible tokens


class DeceptiveAttention(MethodSystem):
    """Settings: ``impermissible`` token ids, ``weight`` of the penalty, ``over`` heads, the ``query`` it is about."""

    slug = "deceptive-attention"
    title = "Deceptive attention"
    paper = "https://arxiv.org/abs/1909.07913"
    code = "https://github.com/danishpruthi/deceptive-attention"

    def __init__(
        self, impermissible: Sequence[int] = (0,), weight: float = 1.0, over: Literal["mean", "max"] = "mean",
        query: int = -1,
    ):  # fmt: skip
        if over not in ("mean", "max"):
            raise SpecError(f'deceptive-attention: over must be "mean" or "max"; got {over!r}')
        self.impermissible, self.weight, self.over, self.query = impermissible, weight, over, query

    def apply(self, model: nn.Module) -> Watching:
        """Watch a model of transformers; after each forward :meth:`penalty` of it may be added to the loss."""

        def impermissible(ids: Tensor) -> Tensor:
            return torch.isin(ids, torch.tensor(list(self.impermissible), device=ids.device))

        return watch(
            model, RegionMass({"impermissible": "impermissible"}), layers=-1, regions={"impermissible": impermissible}
        )

    def penalty(self, watching: Watching) -> Tensor:
        """Of the last forward of a watched model."""
        (seen,) = (watching.seen[site.path] for site in watching.sites)
        return self.of(seen["region_mass"]["impermissible"][..., self.query])

    def of(self, mass: Tensor) -> Tensor:
        """The penalty of the mass ``[B, ...]`` on impermissible tokens."""
        logs = torch.log1p(-mass)
        return -self.weight * (logs.mean() if self.over == "mean" else logs.min())

    def objective(self, model: Classifier, batch: tuple[Tensor, ...]) -> Tensor:
        """What a small classifier's training lowers, on (tokens, labels, impermissible)."""
        tokens, labels, impermissible = batch
        found = model.read(tokens)
        mass = (found.weights * impermissible).sum(1)
        return nn.functional.cross_entropy(found.logits, labels) + self.of(mass)

    def claim(self) -> ClaimNumbers:
        """Classifiers of opinions whose attention must not show what an opinion is made of."""
        from ...study.trainer import Recipe, Task, compete

        kinds = {"plain": None, "deceptive": self.objective, "anonymous": anonymous}
        models = {name: partial(Classifier, objective=kind) for name, kind in kinds.items()}
        result = compete(models, Task(opinions, objective, held, measured, "accuracy"), Recipe(steps=200))
        mass = {name: max(map(shown, result.models[name])) for name in ("plain", "deceptive")}
        accuracy = {name: result.mean(name) for name in kinds}
        return ClaimNumbers.decide(
            result.numbers() | {f"mass_{name}": round(value, 5) for name, value in mass.items()},
            f"Attention on the words that decide is {mass['plain']:.1%} with plain and {mass['deceptive']:.2%} with"
            f" deceptive training (the greatest of the seeds); accuracy is {accuracy['plain']:.1%} and"
            f" {accuracy['deceptive']:.1%}, and {accuracy['anonymous']:.1%} of a model that cannot see these words.",
            attention_is_hidden=mass["deceptive"] <= HIDDEN < mass["plain"],
            costs_little=accuracy["deceptive"] >= accuracy["plain"] - COST,
            the_words_are_used=accuracy["deceptive"] >= accuracy["anonymous"] + NEEDED,
        )


def anonymous(model: Classifier, batch: tuple[Tensor, ...]) -> Tensor:
    """The cross-entropy of a model that is not shown the words that decide."""
    return cross_entropy(model, (batch[0].masked_fill(batch[2], MASK), batch[1]))


def measured(model: Any, batch: tuple[Tensor, ...]) -> Tensor:
    """The accuracy, of a model that is not shown them as it was trained."""
    tokens, labels, impermissible = batch
    return right(model, (tokens.masked_fill(impermissible, MASK) if model.objective is anonymous else tokens, labels))


@torch.no_grad()
def shown(model: Classifier) -> float:
    """Mean attention on the words that decide, over the held sentences."""
    masses: Iterator[Tensor] = ((model.read(x).weights * evidence).sum(1).mean() for x, _, evidence in held())
    return float(torch.stack([*masses]).mean())
