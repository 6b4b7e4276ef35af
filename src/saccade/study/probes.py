"""What claims share: the embedded language model, how it reads, a linear detector, ranks, and how sure a mean is."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from ..core.errors import SpecError
from ..core.stats import Entropy
from ..hosts.handles import install, watch
from ..worlds import text


def embedded(name: str = "lm") -> Any:
    """The embedded language model, or a smaller one: a byte-level LlamaForCausalLM in float32, ready to answer."""
    from transformers import AutoModelForCausalLM

    from ..zoo import path

    return AutoModelForCausalLM.from_pretrained(path(name), dtype=torch.float32).eval()


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


@torch.no_grad()
def mean_loss(model: Any, texts: Tensor, last: int | None = None, program: Any = None) -> float:
    """Loss of a language model on texts ``[S, N]``, in nats per token, of their ``last`` ones (all but the first).

    ``program``: in place of its own attention, as for :func:`saccade.install`.
    """
    last = texts.shape[1] - 1 if last is None else last
    with nullcontext() if program is None else install(model, program):
        logits = (model(tokens, use_cache=False, logits_to_keep=last + 1).logits[0, :-1] for tokens in texts.split(1))
        losses = [cross_entropy(said, tokens[-last:]) for said, tokens in zip(logits, texts, strict=True)]
    return float(torch.stack(losses).mean())


def prose(seed: str, learn: tuple[int, int], held: tuple[int, int], share: float = 0.75) -> tuple[Tensor, Tensor]:
    """Texts to learn from, out of the first ``share`` of the held-out prose, and texts to judge by, out of the rest.

    Each is asked for by its number and length, ``(S, N)``, and is ``[S, N]``.
    """
    whole = text.heldout()
    cut = int(len(whole) * share)
    first, second = (
        torch.stack([example.tokens for example in islice(text.text(length, seed, source=part), count)])
        for part, (count, length) in ((whole[:cut], learn), (whole[cut:], held))
    )
    return first, second


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


def standard_error(x: Tensor) -> float:
    """Of the mean of measurements ``[S]``."""
    return float(x.std() / len(x) ** 0.5)


def surely_positive(x: Tensor) -> bool:
    """Is the mean of measurements ``[S]`` above 0 by more than two standard errors?"""
    return float(x.mean()) > 2 * standard_error(x)


def spearman(x: Tensor, y: Tensor) -> float:
    """Rank correlation of ``[N]`` and ``[N]``; ties have their mean rank, also of values that rounding sets apart."""
    ranks = []
    for values in (x, y):
        apart = values[:, None].double() - values.double()
        close = apart.abs() <= 1e-6 * values.abs().max()
        ranks.append(((apart > 0) & ~close).double().sum(1) + close.double().sum(1) / 2)
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


@torch.no_grad()
def decoding_errors(layer: Any, width: int, steps: int) -> tuple[float, float]:
    """Error of a layer that decodes in bfloat16, token by token, relative to float64 at once.

    ``layer``: of a stream ``[B, N, width]``, with ``cache()``; it is left in float64, its weights rounded to bfloat16.

    Returns:
        The errors over the second and over the last eighth of the steps.
    """
    stream = torch.randn(1, steps, width, generator=torch.Generator().manual_seed(3)).bfloat16()
    low = layer.bfloat16()
    cache = low.cache()
    found = torch.cat([low(token, cache=cache) for token in stream.split(1, 1)], 1).double()
    exact = layer.double()(stream.double())
    eighth = steps // 8
    parts = slice(eighth, 2 * eighth), slice(steps - eighth, steps)
    early, late = (float((found[:, s] - exact[:, s]).norm() / exact[:, s].norm()) for s in parts)
    return early, late


def shape_of_weights(weights: Tensor) -> dict[str, float]:
    """How positive weights ``[..., N, M]`` are distributed.

    Returns:
        ``log_variance``, of their logarithms; ``distance_from_normal``, these logarithms' (Kolmogorov's);
        ``concentration``, what the entropy of a row lacks to uniform, in nats.
    """
    logs = weights.double().log().flatten()
    ranks = (torch.arange(len(logs)) + 0.5) / len(logs)
    normal = torch.special.ndtr((logs.sort().values - logs.mean()) / logs.std())
    entropy = torch.special.entr(weights.double()).sum(-1).mean()
    return {
        "log_variance": round(float(logs.var()), 4),
        "distance_from_normal": round(float((normal - ranks).abs().max()), 4),
        "concentration": round(math.log(weights.shape[-1]) - float(entropy), 4),
    }
