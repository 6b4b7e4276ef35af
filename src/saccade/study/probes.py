"""What claims about language models share: the embedded one, how it reads, a linear detector, how well it detects."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from ..core.errors import SpecError
from ..core.stats import Entropy
from ..hosts.handles import watch


def embedded() -> Any:
    """The embedded language model: a byte-level LlamaForCausalLM in float32, ready to answer."""
    from transformers import AutoModelForCausalLM

    from ..zoo import path

    return AutoModelForCausalLM.from_pretrained(path("lm"), dtype=torch.float32).eval()


@torch.no_grad()
def reading(model: Any, prompts: Tensor, last: int) -> tuple[float, float]:
    """How a language model reads prompts ``[B, N]`` to their end.

    Returns:
        Of the rows that predict the ``last`` tokens of each: entropy of attention, over all layers and heads, and
        loss; both in nats, means.
    """
    entropies, losses = [], []
    for tokens in prompts.split(1):
        with watch(model, Entropy()) as watching:
            logits = model(tokens, use_cache=False, logits_to_keep=last + 1).logits[0, :-1]
        entropies += [seen["entropy"][..., -last - 1 : -1].mean() for seen in watching.seen.values()]
        losses.append(cross_entropy(logits, tokens[0, -last:]))
    return float(torch.stack(entropies).mean()), float(torch.stack(losses).mean())


@dataclass(frozen=True)
class Detector:
    """Logistic regression: the probability ``[...]`` that what has the features ``[..., F]`` is so."""

    weight: Tensor
    bias: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        return (features.to(self.weight) @ self.weight + self.bias).sigmoid()

    @staticmethod
    def fit(features: Tensor, labels: Tensor, c: float = 1.0) -> Detector:
        """As scikit-learn's ``LogisticRegression``: the least ``c * (sum of log losses) + |weight|^2 / 2``.

        Args:
            features: ``[S, F]``.
            labels: ``[S]``, bool or 0/1; both must occur.
            c: inverse strength of the regularization.

        Raises:
            SpecError: the shapes do not fit, or all labels are alike.
        """
        x, y = features.detach().double(), labels.double()
        if x.ndim != 2 or y.shape != x.shape[:1] or y.min() == y.max():
            raise SpecError(f"Detector.fit: [S, F] and [S] with labels of both kinds; got {[*x.shape]}, {[*y.shape]}")
        weight, bias = x.new_zeros(x.shape[1], requires_grad=True), x.new_zeros((), requires_grad=True)
        solver = torch.optim.LBFGS(
            [weight, bias], max_iter=1000, tolerance_grad=1e-8, tolerance_change=1e-12, line_search_fn="strong_wolfe"
        )

        def loss() -> Tensor:
            solver.zero_grad()
            value = c * binary_cross_entropy_with_logits(x @ weight + bias, y, reduction="sum")
            (value := value + weight.square().sum() / 2).backward()
            return value

        with torch.enable_grad():
            solver.step(loss)  # type: ignore[no-untyped-call]
        return Detector(weight.detach(), bias.detach())


def outweighs(gained: int, lost: int) -> bool:
    """Are more of the same questions gained than lost, by two standard errors?"""
    return gained - lost > 2 * math.sqrt(gained + lost)


def auroc(scores: Tensor, labels: Tensor) -> float:
    """How often one of ``scores`` ``[S]`` whose label is true lies above one whose is not, ties half."""
    above = scores[labels][:, None] - scores[~labels]
    return float(((above > 0).double() + (above == 0).double() / 2).mean())


def two_fold(features: Tensor, labels: Tensor) -> float:
    """AUROC of detectors of ``[S, F]`` on the half that they were not trained on: the mean of both halves."""
    a, b = slice(len(labels) // 2), slice(len(labels) // 2, None)
    folds = [(Detector.fit(features[x], labels[x])(features[y]), labels[y]) for x, y in ((a, b), (b, a))]
    return sum(auroc(scores, held_out) for scores, held_out in folds) / 2
