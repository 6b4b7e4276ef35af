"""Questions about a page against what a model knows, and teaching it to be told which of the two is wanted."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ...worlds.text import BOS
from ..base import MethodSystem
from .decore import counterfactuals

CONTEXT, PRIOR, NEITHER = b"\nCopy: ", b"\nTrue: ", b"\nText: "
CUES = {CONTEXT: "context", PRIOR: "prior", NEITHER: "plain"}  # what stands before the words asks for


@dataclass(frozen=True)
class Questions:
    """Pages of prose with one letter changed ``[S, N]``, the words to say again ``[S, 24]``, the two next letters."""

    pages: Tensor
    words: Tensor
    context: Tensor
    prior: Tensor

    @staticmethod
    @torch.no_grad()
    def of(model: Any, count: int, seed: str) -> Questions:
        """Those whose English letter the model knows: from the words alone, it is likelier than all others together."""
        found: list[tuple[Tensor, Tensor, int, int]] = []
        stream = counterfactuals(96, f"knob/{seed}")
        while len(found) < count:
            some = list(islice(stream, 64))
            begin = torch.stack([torch.cat([torch.tensor([BOS]), e.tokens[-24:]]) for e, _ in some])
            said = model(begin, use_cache=False, logits_to_keep=1).logits[:, -1].softmax(-1)
            found += [
                (e.tokens[: -24 - len(CONTEXT)], e.tokens[-24:], int(e.tokens[e.answers[0].evidence_start]), letter)
                for (e, letter), own in zip(some, said, strict=True)
                if own[letter] > 0.5
            ]
        pages, words, context, prior = zip(*found[:count], strict=True)
        return Questions(torch.stack(pages), torch.stack(words), torch.tensor(context), torch.tensor(prior))

    def prompts(self, cue: bytes) -> Tensor:
        """With the words' cue, ``[S, N + 7 + 24]``."""
        return torch.cat([self.pages, torch.tensor([*cue]).expand(len(self.pages), -1), self.words], 1)

    def __getitem__(self, rows: Any) -> Questions:
        return Questions(self.pages[rows], self.words[rows], self.context[rows], self.prior[rows])

    def wanted(self, cue: bytes) -> Tensor:
        """The answer that a cue asks for."""
        return self.prior if cue == PRIOR else self.context


def teach(model: Any, questions: Questions, batch: int = 8, rate: float = 1e-3) -> None:
    """Fine-tune: each question with either cue, one pass over them."""
    parts = torch.arange(len(questions.pages)).split(batch)
    solver = torch.optim.Adam(model.parameters(), rate)
    schedule = torch.optim.lr_scheduler.LinearLR(solver, 1.0, 0.0, len(parts))
    for rows in parts:
        some = questions[rows]
        tokens = torch.cat([some.prompts(cue) for cue in (CONTEXT, PRIOR)])
        wanted = torch.cat([some.context, some.prior])
        solver.zero_grad()
        cross_entropy(model(tokens, use_cache=False, logits_to_keep=1).logits[:, -1], wanted).backward()
        solver.step()
        schedule.step()
    model.zero_grad(set_to_none=True)


@torch.no_grad()
def shares(model: Any, questions: Questions, cue: bytes, knob: MethodSystem | None = None) -> tuple[float, float]:
    """How often the context's answer, and the model's own, comes next."""
    said = []
    for part in questions.prompts(cue).split(32):
        with knob.apply(model) if knob else nullcontext():
            said.append(model(part, use_cache=False, logits_to_keep=1).logits[:, -1].argmax(-1))
    answers = torch.cat(said)
    context, prior = (float((answers == x).float().mean()) for x in (questions.context, questions.prior))
    return context, prior
