"""The sentences of a verbalized saliency map, and the prompt that asks for one: written, and read again."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

SENTENCE = re.compile(
    r"The (?:word|phrase) » (.+?) « (?:is most important for the prediction|is also salient) \((\d+) %\)"
)
SCORED = re.compile(r"(\S+) \((-?\d+\.\d\d)\)")


class Said(NamedTuple):
    """What one sentence says: the words and their coverage in percent."""

    words: list[str]
    percent: int


def written(said: Sequence[Said]) -> str:
    """A sentence for each, in their order."""
    return " ".join(
        f"The {'phrase' if len(words) > 1 else 'word'} » {' '.join(words)} «"
        f" {'is also salient' if rank else 'is most important for the prediction'} ({percent} %)."
        for rank, (words, percent) in enumerate(said)
    )


def read(text: str) -> list[Said]:
    """What the sentences of a verbalization say; words must hold no blanks."""
    return [Said(words.split(" "), int(percent)) for words, percent in SENTENCE.findall(text)]


def prompt(words: Sequence[str], saliency: Sequence[float], task: str, label: str) -> str:
    """What a language model is asked for a verbalization; words must hold no blanks."""
    listed = " ".join(f"{word} ({score:.2f})" for word, score in zip(words, saliency, strict=True))
    return (
        f"A text with importance scores: {listed}\nA classifier ({task}) saw this text without the scores and said"
        f" '{label}'. Behind each word stands how important it was for that. Explain briefly, by the scores, why it"
        f" said '{label}'."
    )


def read_prompt(text: str) -> list[tuple[str, float]]:
    """The words and scores of a prompt."""
    return [(word, float(score)) for word, score in SCORED.findall(text.partition("\n")[0])]


def guess(said: Sequence[Said]) -> int:
    """What a reader who knows the words' meaning thinks was predicted: 1 for praise, 0 for blame or no idea.

    Even adjectives praise and odd ones blame, by the coverage of their sentence; "not" (adv0) turns its sentence.
    """
    opinion = 0.0
    for words, percent in said:
        adjectives = sum(1 - 2 * (int(word[3:]) % 2) for word in words if word.startswith("adj"))
        opinion += percent * adjectives * (-1 if "adv0" in words else 1)
    return int(opinion > 0)
