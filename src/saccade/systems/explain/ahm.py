"""Attention head masking (AHM): with some heads silent, a classifier's features tell better what it was never taught.

    z(x) = the features of x of the trained model, the outputs of the masked heads being zero
    score(x) = max over classes c of -(z(x) - mean[c])' S^-1 (z(x) - mean[c])      Mahalanobis, S shared by the classes
    score(x) = -|z(x)/|z(x)| - the k-th nearest of the training set|                kNN
    x is out of distribution if its score is below that of 95% of what is not

Nothing is trained: the mask acts when features are made, those of the training set included.

Paper: Out-of-Distribution Detection with Attention Head Masking for Multimodal Document Classification,
    arXiv:2408.11237
Code: none of the method (https://github.com/constantinouchristos/OOD-AHM prepares the data)

Differs: only the abstract and a summary of the paper were at hand: heads are masked after training, for distance-based
scores. How the paper chooses the heads is not known to us. Here it is the one or two heads without which outliers that
need no data are told best: texts of the known kinds with half of their words replaced by words of the vocabulary. The
claim's documents are text alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from itertools import combinations, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...core import edits
from ...hosts.handles import host_of
from ...worlds.documents import SIZES, TOPICS, batch, documents
from ...worlds.grammar import words
from ..base import ClaimNumbers, MethodSystem
from ._classifier import bert
from ._heads import Heads, edited
from ._outliers import fpr95, half_replaced, mahalanobis, nearest

TAUGHT, NEVER_TAUGHT = range(4), range(4, TOPICS)
BATCH = 32

Batch = tuple[Tensor, Tensor]
"""Tokens ``[B, N]``, 0 being padding, and labels ``[B]``."""


class AHM(MethodSystem):
    """Settings: ``heads``, the (layer, head) pairs to mask, such as :func:`choose` finds."""

    slug = "ahm"
    title = "Attention head masking (AHM)"
    paper = "https://arxiv.org/abs/2408.11237"

    def __init__(self, heads: Heads = ((0, 0),)):
        self.heads = heads

    def apply(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Let the heads put out zeros. Raises SpecError if the model has no such layer or head."""
        return edited(model, edits.Zero(), self.heads)

    def claim(self) -> ClaimNumbers:
        """FPR95 of documents of unknown topics: AHM, the same distances without it, and scores of the logits."""
        from ...study.trainer import Recipe, Task, accuracy, compete, labelled

        task = Task(batches, labelled, lambda: islice(batches(999), 4), accuracy, "accuracy")
        fresh = partial(bert, len(words(SIZES)), len(TAUGHT), 2, max_position_embeddings=256)
        result = compete({"bert": fresh}, task, Recipe(steps=150))
        train, inside = (list(islice(batches(seed), count)) for seed, count in (("train", 8), ("inside", 6)))
        outside = list(islice(batches("outside", NEVER_TAUGHT), 6))
        found: dict[str, list[float]] = {}
        chosen = []
        for model in (one.model for one in result.models["bert"]):
            heads = choose(model, train, list(islice(batches("choose"), 4)))
            chosen.append([list(pair) for pair in heads])
            told = {
                name: [features(model, data, mask) for data in (train, inside, outside)]
                for name, mask in (("ahm", heads), ("plain", ()))
            }
            for name, (known, near, far) in told.items():
                for kind, score in (("mahalanobis", mahalanobis(*known[::2])), ("knn", nearest(known.states))):
                    found.setdefault(f"{name}_{kind}", []).append(fpr95(score(near.states), score(far.states)))
            _, near, far = told["plain"]
            found.setdefault("msp", []).append(fpr95(*(x.logits.softmax(-1).amax(-1) for x in (near, far))))
            found.setdefault("energy", []).append(fpr95(*(x.logits.logsumexp(-1) for x in (near, far))))
        mean = {name: sum(values) / len(values) for name, values in found.items()}
        best = min(mean["ahm_mahalanobis"], mean["ahm_knn"])
        return ClaimNumbers.decide(
            result.numbers() | {f"fpr95_{k}": [round(x, 3) for x in v] for k, v in found.items()} | {"heads": chosen},
            f"FPR95 of documents of unknown topics, Mahalanobis and kNN distances: {mean['ahm_mahalanobis']:.1%} and"
            f" {mean['ahm_knn']:.1%} with masked heads, {mean['plain_mahalanobis']:.1%} and {mean['plain_knn']:.1%}"
            f" without; {mean['msp']:.1%} by the greatest probability and {mean['energy']:.1%} by the energy.",
            below_msp_and_energy=best < min(mean["msp"], mean["energy"]),
            masking_helps_mahalanobis=mean["ahm_mahalanobis"] < mean["plain_mahalanobis"],
            masking_helps_knn=mean["ahm_knn"] < mean["plain_knn"],
        )


class Features(NamedTuple):
    """The first token's last state ``[S, width]``, logits ``[S, classes]`` and labels ``[S]``."""

    states: Tensor
    logits: Tensor
    labels: Tensor


@torch.no_grad()
def features(model: Any, data: Iterable[Batch], heads: Heads) -> Features:
    """What a classifier makes of data with these heads masked."""
    found = []
    with AHM(heads).apply(model):
        for tokens, labels in data:
            out = model(tokens, attention_mask=(tokens != 0).long(), output_hidden_states=True)
            found.append((out.hidden_states[-1][:, 0], out.logits, labels))
    return Features(*(torch.cat(column) for column in zip(*found, strict=True)))


def choose(model: Any, train: list[Batch], held: list[Batch], most: int = 2) -> list[tuple[int, int]]:
    """The heads, at most so many, without which half-replaced texts are best told from the held ones (Mahalanobis)."""
    replaced = half_replaced(held, torch.cat([tokens[tokens != 0] for tokens, _ in train]).unique())
    pairs = [(site.layer, head) for site in host_of(model).sites() for head in range(site.heads)]
    candidates = [list(heads) for count in range(1, most + 1) for heads in combinations(pairs, count)]

    def told(heads: Heads) -> float:
        score = mahalanobis(*features(model, train, heads)[::2])
        return fpr95(*(score(features(model, data, heads).states) for data in (held, replaced)))

    return min(candidates, key=told)


def batches(seed: int | str, topics: range = TAUGHT) -> Iterator[Batch]:
    """Endless batches: documents ``[BATCH, N]`` and the topic of each."""
    stream = documents(seed, topics)
    while True:
        some = batch(stream, BATCH)
        yield some.tokens, some.topic
