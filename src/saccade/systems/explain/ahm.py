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

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from itertools import combinations, islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core import edits
from ...hosts.handles import edit, host_of
from ...worlds.grammar import Sizes, grammar, words
from ..base import ClaimNumbers, MethodSystem
from ._outliers import fpr95, mahalanobis, nearest

Heads = Sequence[tuple[int, int]]  # layer, head
KNOWN, UNKNOWN, NOUNS = 4, 2, 6  # topics that are taught and that are not, and nouns of each
LOOSE = 0.2  # share of a document's nouns that are of any topic
SIZES = Sizes(nouns=(KNOWN + UNKNOWN) * NOUNS)
BATCH = 32


class AHM(MethodSystem):
    """Settings: ``heads``, the (layer, head) pairs to mask, such as :func:`choose` finds."""

    slug = "ahm"
    title = "Attention head masking (AHM)"
    paper = "https://arxiv.org/abs/2408.11237"

    def __init__(self, heads: Heads = ((0, 0),)):
        self.heads = heads

    def apply(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Let the heads put out zeros. Raises SpecError if the model has no such layer or head."""
        with ExitStack() as stack:
            for layer in sorted({layer for layer, _ in self.heads}):
                mine = [head for at, head in self.heads if at == layer]
                stack.enter_context(edit(model, edits.Zero(), layers=layer, heads=mine))
            return stack.pop_all()

    def claim(self) -> ClaimNumbers:
        """FPR95 of documents of unknown topics: AHM, the same distances without it, and scores of the logits."""
        from ...study.trainer import Recipe, Task, accuracy, compete

        task = Task(documents, loss, lambda: islice(documents(999), 4), lambda m, b: accuracy(Logits(m), b), "accuracy")
        result = compete({"bert": bert}, task, Recipe(steps=150))
        found: dict[str, list[float]] = {}
        chosen = []
        for model in result.models["bert"]:
            train, inside = (list(islice(documents(seed), count)) for seed, count in (("train", 8), ("inside", 6)))
            outside = list(islice(documents("outside", known=False), 6))
            heads = choose(model, train, list(islice(documents("choose"), 4)))
            chosen.append([list(pair) for pair in heads])
            for name, mask in (("ahm", heads), ("plain", ())):
                detectors = distances(model, train, mask)
                for kind, score in detectors.items():
                    found.setdefault(f"{name}_{kind}", []).append(fpr95(score(inside), score(outside)))
            for kind, of_logits in (("msp", lambda x: x.softmax(-1).amax(-1)), ("energy", lambda x: x.logsumexp(-1))):
                told = [of_logits(features(model, data, ())[1]) for data in (inside, outside)]
                found.setdefault(kind, []).append(fpr95(*told))
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


Batch = tuple[Tensor, Tensor]
Score = Callable[[Iterable[Batch]], Tensor]


class Logits(nn.Module):
    """A classifier of transformers as a function of tokens, 0 being padding."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        """``[B, classes]``."""
        return self.model(tokens, attention_mask=(tokens != 0).long()).logits


@torch.no_grad()
def features(model: Any, data: Iterable[Batch], heads: Heads) -> tuple[Tensor, Tensor, Tensor]:
    """First token's last state ``[S, width]``, logits and labels, with these heads masked."""
    found = []
    with AHM(heads).apply(model):
        for tokens, labels in data:
            out = model(tokens, attention_mask=(tokens != 0).long(), output_hidden_states=True)
            found.append((out.hidden_states[-1][:, 0], out.logits, labels))
    states, logits, told = (torch.cat(column) for column in zip(*found, strict=True))
    return states, logits, told


def distances(model: Any, train: Iterable[Batch], heads: Heads) -> dict[str, Score]:
    """Scores by distance to the training set, both with these heads masked."""
    states, _, labels = features(model, train, heads)
    fitted = {"mahalanobis": mahalanobis(states, labels), "knn": nearest(states)}

    def score(one: Callable[[Tensor], Tensor], data: Iterable[Batch]) -> Tensor:
        return one(features(model, data, heads)[0])

    return {name: partial(score, one) for name, one in fitted.items()}


def choose(model: Any, train: list[Batch], held: list[Batch], most: int = 2) -> list[tuple[int, int]]:
    """The heads, at most so many, without which half-replaced texts are best told from the held ones (Mahalanobis)."""
    source = torch.Generator().manual_seed(0)
    vocabulary = torch.cat([tokens[tokens != 0] for tokens, _ in train]).unique()
    replaced = []
    for tokens, labels in held:
        drawn = vocabulary[torch.randint(len(vocabulary), tokens.shape, generator=source)]
        swap = (torch.rand(tokens.shape, generator=source) < 0.5) & (tokens != 0)
        replaced.append((torch.where(swap, drawn, tokens), labels))
    pairs = [(site.layer, head) for site in host_of(model).sites() for head in range(site.heads)]
    candidates = [list(heads) for count in range(1, most + 1) for heads in combinations(pairs, count)]

    def told(heads: Heads) -> float:
        score = distances(model, train, heads)["mahalanobis"]
        return fpr95(score(held), score(replaced))

    return min(candidates, key=told)


def bert() -> Any:
    """A small, fresh BERT that classifies documents of the known topics."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=len(words(SIZES)), hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=256, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    config.num_labels = KNOWN
    return BertForSequenceClassification(config)


def loss(model: Any, batch: Batch) -> Tensor:
    """Cross-entropy of the topics."""
    return F.cross_entropy(Logits(model)(batch[0]), batch[1])


def documents(seed: int | str, known: bool = True) -> Iterator[Batch]:
    """Endless batches of two sentences about a topic, and which it is; nouns of every topic occur in each."""
    rng, source = random.Random(f"documents/{seed}"), grammar(f"documents/{seed}", SIZES)
    names = list(words(SIZES))
    nouns = {
        token: int(name.removeprefix("noun").removesuffix(".pl"))
        for token, name in enumerate(names)
        if name.startswith("noun")
    }
    while True:
        rows, labels = [], []
        for _ in range(BATCH):
            topic = rng.randrange(KNOWN) if known else KNOWN + rng.randrange(UNKNOWN)
            said = [token for sentence in islice(source, 2) for token in sentence.tokens.tolist()]
            for i, token in enumerate(said):
                if token in nouns and rng.random() >= LOOSE:
                    plural = ".pl" if names[token].endswith(".pl") else ""
                    said[i] = words(SIZES)[f"noun{topic * NOUNS + nouns[token] % NOUNS}{plural}"]
            rows.append(torch.tensor(said))
            labels.append(topic)
        yield nn.utils.rnn.pad_sequence(rows, batch_first=True), torch.tensor(labels)
