"""Prompts in pairs that differ in which of two facts is asked, as circuits are found by them."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from ...worlds.recall import KEYS
from ...worlds.text import encode, heldout, window

KNOWN, NEW = "\nThe pass key of {} is {}", "\nVAR {} = {}"  # what the embedded model was trained on, and was not


@dataclass(frozen=True)
class Prompts:
    """tokens, other ``[B, N]``; right, wrong ``[B]``: what follows; places of right; answers ``[B, 4]``: all digits."""

    tokens: Tensor
    other: Tensor
    right: Tensor
    wrong: Tensor
    places: list[int]
    answers: Tensor

    def metric(self, logits: Tensor) -> float:
        """Mean of right minus wrong, of logits ``[B, V]``."""
        return float((logits.gather(1, self.right[:, None]) - logits.gather(1, self.wrong[:, None])).mean())


def ask(form: str, count: int, length: int = 96, seed: int = 0) -> Prompts:
    """Two facts of a form in ``length`` bytes of prose, and the question about the one, or about the other."""
    rng, rows, places, answers = random.Random(f"{form}/{seed}"), [], [], []
    for _ in range(count):
        names, digits = rng.sample(KEYS, 2), rng.sample("0123456789", 2)
        facts = [form.format(n, f"{d}{rng.randrange(1000):03d}") for n, d in zip(names, digits, strict=True)]
        prose, cut = window(heldout(), length, rng).decode(), rng.randint(0, length)
        order = rng.sample(facts, 2)
        page = f"{prose[:cut]}{order[0]}.\n{order[1]}.\n{prose[cut:]}"
        questions = [encode((page + form.format(name, "")).encode()) for name in names]
        rows.append([*questions, *(torch.tensor(ord(digit)) for digit in digits)])
        answers.append(torch.tensor([*facts[0][-4:].encode()]))
        places.append(1 + page.index(facts[0]) + len(facts[0]) - 4)  # BOS is in front
    tokens, other, right, wrong = (torch.stack(column) for column in zip(*rows, strict=True))
    return Prompts(tokens, other, right, wrong, places, torch.stack(answers))
