"""Recursive ROAR: words called important are taken away and a model is trained anew, over and over: how fast it fails.

    importance[i] of token i, for the right class c (:mod:`._importance`):
        attention               w[i]
        gradient                length of d logit[c] / d onehot[i] = d logit[c] / d e[i] E'      (E: the embeddings)
        input x gradient        | d logit[c] / d e[i] . e[i] |
        integrated gradient     | mean over s = 1..samples of  d logit[c](s / samples * e) / d e[i] . e[i] |
        random                  a draw
    every round: model <- trained on the masked sentences;  the next ``step`` of each sentence's tokens, by the
        importance that this model gives them, is masked too, in what is trained on and in what is tested
    RACU = area between the accuracies with random and with other masks / area between random and all masked

Paper: Evaluating the Faithfulness of Importance Measures in NLP by Recursively Masking Allegedly Important Tokens and
    Retraining, arXiv:2110.08412
Code: https://github.com/AndreasMadsen/nlp-roar-interpretability (nlproar/dataset/roar.py, nlproar/explain/,
    export/roar_plot.py)

Differs: the official integrated gradient differentiates by e through its scaling and so weighs step s by s / samples;
here it is the paper's integral. In a model of transformers the likeliest next token stands for the right class,
attention is the last query's in all layers and heads, and one round is done to each prompt before it is read: what a
model trained anew would be shown.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle, islice
from typing import Any, get_args

import torch
from torch import Tensor, nn

from ...core.errors import SpecError
from ..base import ClaimNumbers, MethodSystem
from ._classifier import MASK, Classifier, held, objective, opinions, right
from ._importance import Measure, of_classifier, of_model

Batch = tuple[Tensor, Tensor]  # tokens and labels
ROUNDS, BATCHES = 5, 16  # of the claim: masked shares 0, 0.2, ..., 1, and what its classifiers learn from


class RecursiveROAR(MethodSystem):
    """Settings: ``measure``, the ``step`` of a round, the ``mask`` token, ``samples`` of the integrated gradient."""

    slug = "recursive-roar"
    title = "Recursive ROAR (remove and retrain)"
    paper = "https://arxiv.org/abs/2110.08412"
    code = "https://github.com/AndreasMadsen/nlp-roar-interpretability"

    def __init__(self, measure: Measure = "attention", step: float = 0.1, mask: int = 0, samples: int = 20):
        if measure not in get_args(Measure):
            raise SpecError(f"recursive-roar: measure must be one of {', '.join(get_args(Measure))}; got {measure!r}")
        self.measure, self.step, self.mask, self.samples = measure, step, mask, samples

    @contextmanager
    def apply(self, model: nn.Module) -> Iterator[None]:
        """Mask each prompt's most important tokens before the model reads it; single tokens are read as they are."""

        def before(module: Any, args: tuple[Any, ...], given: dict[str, Any]) -> Any:
            tokens = args[0] if args else given.get("input_ids")
            if tokens is None or tokens.shape[1] < 2:
                return None
            masked = masked_more(tokens, of_model(module, tokens, self.measure, self.samples), self.step, self.mask)
            return ((masked, *args[1:]), given) if args else (args, {**given, "input_ids": masked})

        hook = model.register_forward_pre_hook(before, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    def claim(self) -> ClaimNumbers:
        """Curves of all measures on classifiers of opinions, and the areas between them and random masks."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # of random importance
            curves = {measure: curve(RecursiveROAR(measure, 1 / ROUNDS, samples=8)) for measure in get_args(Measure)}
        areas = {name: racu(found, curves["random"]) for name, found in curves.items() if name != "random"}
        told = ", ".join(f"{name} {area:.0%}" for name, area in areas.items())
        return ClaimNumbers.decide(
            {f"accuracy {name}": [round(x, 3) for x in found] for name, found in curves.items()}
            | {f"racu {name}": round(area, 3) for name, area in areas.items()},
            f"Relative areas between the curves (RACU): {told}.",
            random_masks_cost_accuracy=curves["random"][0] > curves["random"][-2] > curves["random"][-1],
            all_measures_are_better_than_random=min(areas.values()) > 0,
        )


def masked_more(tokens: Tensor, importance: Tensor, share: float, mask: int) -> Tensor:
    """Tokens ``[B, N]``, where a share of each row is masked: what was masked before, then the most important.

    0 is padding and stays, unless it is the mask.
    """
    keep = (tokens != 0) | (tokens == mask)
    count = (share * keep.sum(1, keepdim=True) + 1e-6).long()
    order = importance.masked_fill(~keep, -torch.inf).masked_fill(tokens == mask, torch.inf)
    rank = order.argsort(1, descending=True).argsort(1)
    return tokens.masked_fill((rank < count) & keep, mask)


def curve(system: RecursiveROAR, seed: int = 0) -> list[float]:
    """Accuracy of a classifier trained anew after each round, with 0, step, ... and at last all tokens masked."""
    from ...study.trainer import Recipe, Task, compete

    train: list[Batch] = [(x, y) for x, y, _ in islice(opinions(seed), BATCHES)]
    test: list[Batch] = [(x, y) for x, y, _ in held()]
    found: list[float] = []
    for number in range(1, ROUNDS + 1):
        task = Task(lambda _, data=train: cycle(data), objective, lambda data=test: data, right)  # type: ignore[misc]
        result = compete({"classifier": Classifier}, task, Recipe(steps=100, seeds=(seed,)))
        found += result.scores["classifier"]
        if number < ROUNDS:
            model, share = result.models["classifier"][0].eval(), number * system.step
            for data in (train, test):
                scores = [of_classifier(model, *batch, system.measure, system.samples) for batch in data]
                data[:] = [(masked_more(x, by, share, MASK), y) for (x, y), by in zip(data, scores, strict=True)]
    praise = torch.cat([y for _, y in test]).float().mean().item()
    return [*found, max(praise, 1 - praise)]


def racu(accuracies: Sequence[float], baseline: Sequence[float]) -> float:
    """Relative area between two curves over equal steps of masked shares that end with everything masked, in -1..1."""
    area = torch.trapezoid(torch.tensor([b - a for a, b in zip(accuracies, baseline, strict=True)]))
    most = torch.trapezoid(torch.tensor([b - baseline[-1] for b in baseline]))
    return float((area / most).clamp(-1, 1))
