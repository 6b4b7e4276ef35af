"""What the claims about translation share: batches of the world of small languages, and a model's arguments."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from ...worlds.translation import Translation
    from ...worlds.trees import Split

BATCH = 32
HELD = 999  # the seed of what is never trained on


def vocabulary() -> int:
    """Tokens of source and target, which share one table."""
    from ...worlds.grammar import words
    from ...worlds.translation import target_words

    return max(len(words()), len(target_words()))


def pairs(seed: int, split: Split = "any") -> Iterator[Translation]:
    """Endless batches of sentences and their translations; ``split`` says which combinations of words occur."""
    from ...worlds.translation import batch, translation

    stream = translation(seed, split=split)
    while True:
        yield batch(stream, BATCH)


def told(given: Translation) -> tuple[Tensor, ...]:
    """Source, target so far, which of the source are words, and what follows: an EncoderDecoder's, with labels."""
    return given.tokens, given.target[:, :-1], given.tokens != 0, given.labels


def aligned(looked: Tensor, given: Translation) -> float:
    """Share of the target's words with a counterpart that find it: that ``looked [B, T, N]`` at it most."""
    gold = given.alignment[:, 1:]  # a row of the target predicts the word after it
    return float(gold.gather(-1, looked.argmax(-1, keepdim=True))[gold.any(-1)].float().mean())
