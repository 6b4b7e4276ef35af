"""Tasks of one letter, to be learned from examples in the prompt: "q: Q", "heard: d".

same, upper, lower   from a letter to it, to its capital, from a capital to it
first, last          from a word of five letters to its first, or last
vowel                from a letter to y or n
"""

from __future__ import annotations

import random
import re
import string
from collections.abc import Callable

import torch
from torch import Tensor

from .text import encode, heldout

__all__ = ["Task", "shown", "tasks"]

Task = Callable[[random.Random], tuple[str, str]]
"""Draws an input and its output."""


def tasks() -> dict[str, Task]:
    """All six, by name."""
    words = sorted(set(re.findall(r"\b[a-z]{5}\b", heldout().decode())))
    letters = string.ascii_lowercase

    def each(inputs: str | list[str], output: Callable[[str], str]) -> Task:
        def draw(rng: random.Random) -> tuple[str, str]:
            x = rng.choice(inputs)
            return x, output(x)

        return draw

    return {
        "same": each(letters, str), "upper": each(letters, str.upper), "lower": each(letters.upper(), str.lower),
        "first": each(words, lambda x: x[0]), "last": each(words, lambda x: x[-1]),
        "vowel": each(letters, lambda x: "y" if x in "aeiou" else "n"),
    }  # fmt: skip


def shown(task: Task, shots: int, count: int, seed: str) -> tuple[Tensor, Tensor]:
    """Prompts ``[count, N]``: an input, after ``shots`` examples; and the output that comes next ``[count]``."""
    rng, prompts, answers = random.Random(seed), [], []
    for _ in range(count):
        asked, answer = task(rng)
        page = "".join("{}: {}\n".format(*task(rng)) for _ in range(shots))
        prompts.append(encode(f"{page}{asked}: ".encode()))
        answers.append(ord(answer))
    return torch.stack(prompts), torch.tensor(answers)
