"""Saliency map verbalization: which words a prediction rests on, told in a few sentences whose numbers are exact.

Search-based, without a model. With a[i] the saliency of word i for what was predicted, in windows of ``window`` words:

    convolution search   every choice of 2 to window - 2 words of a window
    span search          3, 5, ... words at its centre
    a candidate counts if none of its a is below 0 and their mean is above the mean of the ``top`` share of all a
    total search         single words
    coverage(span) = sum of its a / sum of all positive a
    said: the words of the five candidates with the greatest coverage of each search, neighbours joined to spans, of
        these the upper quarter by coverage, greatest first

Instruction-based: a prompt with every word and its score that asks a language model to put the map in words.

Paper: Saliency Map Verbalization: Comparing Feature Importance Representations from Model-free and Instruction-based
    Methods, arXiv:2210.07222
Code: https://github.com/DFKI-NLP/SMV (src/search_methods/searches.py and post_searches.py, src/tools.py,
    src/chatgpt/ChatGPT_test.py)

Differs: the official coverage of a span leaves out its last word (so a single word's is 0) and its windows the text's
last word; both count here. Every sentence ends with its coverage, which the official summary had and dropped. The
prompt is worded anew, and no language model answers it. A model of transformers is explained by input x gradient for
its likeliest next token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import combinations

import torch
from torch import Tensor, nn

from ..base import ClaimNumbers, MethodSystem
from ._classifier import Classifier, held, objective, opinions, right
from ._importance import integrated, of_model
from ._sentences import Said, guess, prompt, read, read_prompt, written

BEST = 5  # candidates of each search
SIMULATED = 0.1  # by how much a reader must guess more predictions than from random maps


class SaliencyVerbalization(MethodSystem):
    """Settings: ``window``, the words of a search's window, and ``top``, the share of words whose mean is the bar."""

    slug = "saliency-verbalization"
    title = "Saliency map verbalization"
    paper = "https://arxiv.org/abs/2210.07222"
    code = "https://github.com/DFKI-NLP/SMV"

    def __init__(self, window: int = 5, top: float = 0.4):
        self.window, self.top = window, top

    def apply(self, model: nn.Module) -> AbstractContextManager[Callable[[Tensor, Sequence[str]], str]]:
        """Gives a function of tokens ``[1, N]`` and their words that says why the next token is the likeliest."""

        def explain(tokens: Tensor, words: Sequence[str]) -> str:
            saliency = of_model(model, tokens, "input x gradient")[0]
            return self.verbalize(words, saliency.tolist())

        return nullcontext(explain)

    def verbalize(self, words: Sequence[str], saliency: Sequence[float]) -> str:
        """Sentences about a map; "" if nothing in it is positive."""
        if max(saliency, default=0) <= 0:
            return ""
        found: set[int] = set()
        for search in (self.convolution(saliency), self.spans(saliency), [(i,) for i in range(len(saliency))]):
            best = sorted(set(search), key=lambda at: -coverage(at, saliency))[:BEST]
            found |= {i for at in best for i in at}
        joined: list[list[int]] = []
        for i in sorted(found):
            if not joined or joined[-1][-1] < i - 1:
                joined.append([])
            joined[-1].append(i)
        covered = sorted(((coverage(span, saliency), span) for span in joined), key=lambda one: -one[0])
        bar = float(torch.tensor([share for share, _ in covered], dtype=torch.float64).quantile(0.75))
        return written([Said([words[i] for i in span], round(100 * x)) for x, span in covered if x >= bar])

    def convolution(self, saliency: Sequence[float]) -> Iterable[tuple[int, ...]]:
        """Places of candidates that need not be neighbours."""
        shapes = [at for count in range(2, self.window - 1) for at in combinations(range(self.window), count)]
        return self._coherent(shapes, saliency)

    def spans(self, saliency: Sequence[float]) -> Iterable[tuple[int, ...]]:
        """Places of candidates that are neighbours, at the centre of a window."""
        middle = self.window // 2
        shapes = [tuple(range(middle - half, middle + half + 1)) for half in range(1, middle + 1)]
        return self._coherent(shapes, saliency)

    def _coherent(self, shapes: Iterable[tuple[int, ...]], saliency: Sequence[float]) -> Iterable[tuple[int, ...]]:
        count = max(1, int(self.top * len(saliency)))
        bar = sum(sorted(saliency, reverse=True)[:count]) / count
        for shape in shapes:
            for start in range(len(saliency) - self.window + 1):
                at = tuple(start + i for i in shape)
                values = [saliency[i] for i in at]
                if min(values) >= 0 and sum(values) / len(values) > bar:
                    yield at

    def claim(self) -> ClaimNumbers:
        """Predictions of a classifier of opinions: are the numbers in the text, and can a reader guess from it?"""
        from ...study.trainer import Recipe, Task, compete
        from ...worlds.grammar import words
        from ...worlds.opinions import SIZES

        task = Task(opinions, objective, held, right, "accuracy")
        result = compete({"classifier": Classifier}, task, Recipe(250, seeds=(0,)))
        model, names = result.models["classifier"][0].eval(), list(words(SIZES))
        errors, guessed, by_chance, scores = [], [], [], []
        source = torch.Generator().manual_seed(0)
        for tokens, *_ in held()[:4]:
            predicted = model(tokens).argmax(-1)
            maps = integrated(model.of_embeddings(tokens), model.embed(tokens), predicted)
            for row, saliency, label in zip(tokens, maps, predicted.tolist(), strict=True):
                said = [names[token] for token in row.tolist() if token]
                values = saliency[: len(said)].tolist()
                text = self.verbalize(said, values)
                errors += [min(abs(one.percent - 100 * x) for x in places(one, said, values)) for one in read(text)]
                told = read_prompt(prompt(said, values, "praise or blame", str(label)))
                scores += [abs(score - value) for (_, score), value in zip(told, values, strict=True)]
                noise = torch.rand(len(said), generator=source).tolist()
                guessed.append(guess(read(text)) == label)
                by_chance.append(guess(read(self.verbalize(said, noise))) == label)
        told_right, chance = sum(guessed) / len(guessed), sum(by_chance) / len(by_chance)
        return ClaimNumbers.decide(
            {
                "accuracy": round(result.mean("classifier"), 3), "largest_error_percent": round(max(errors), 3),
                "largest_error_of_a_prompt": round(max(scores), 4), "guessed": round(told_right, 3),
                "guessed_from_random_maps": round(chance, 3),
            },
            f"Coverages read from the text differ by at most {max(errors):.2f} percent points from the map's. A reader"
            f" who knows what the words of a text mean, and nothing else, guesses {told_right:.1%} of the predictions,"
            f" and {chance:.1%} from texts about random maps.",
            numbers_are_recovered=max(errors) <= 0.5 + 1e-6 and max(scores) <= 0.005 + 1e-6,
            predictions_can_be_guessed=told_right >= chance + SIMULATED,
        )  # fmt: skip


def coverage(at: Iterable[int], saliency: Sequence[float]) -> float:
    """Share of the positive saliency that lies at these places, at least 0."""
    return max(0.0, sum(saliency[i] for i in at) / sum(a for a in saliency if a > 0))


def places(one: Said, text: Sequence[str], saliency: Sequence[float]) -> list[float]:
    """Coverage of a sentence's words at every place of the text where they stand in a row."""
    size = len(one.words)
    return [coverage(range(i, i + size), saliency) for i in range(len(text)) if list(text[i : i + size]) == one.words]
