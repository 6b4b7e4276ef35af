"""Requests and answers in a small chat template of bytes, most answered from memory; a model tuned on them, asked."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from ...core.stats import RegionMass
from ...hosts.handles import watch
from ...worlds import recall
from ...worlds.text import Example, encode, window
from ..base import MethodSystem

USER, ASSISTANT, INDICATOR = b"<|user|>\n", b"\n<|assistant|>\n", b" [IND]"
NEEDS = 0.1  # of the examples to tune on: the answer is in the request
PAGE, DIGITS, ANSWER = 160, 4, len("The pass key of qx is 7305")  # bytes: of request and answer, and of the answer
_DRAW = random.Random("facts")
FACTS = {name.lower().encode(): b"%04d" % _DRAW.randrange(10**DIGITS) for name in _DRAW.sample(recall.KEYS, 16)}


@dataclass(frozen=True)
class Pair:
    """A user's request and its answer, in bytes; ``needs``: the answer is in the request."""

    request: bytes
    answer: bytes
    needs: bool

    @staticmethod
    def of(example: Example) -> Pair:
        """The last line of an example is the answer."""
        request, _, answer = bytes(example.tokens[1:].tolist()).rpartition(b"\n")
        return Pair(request, answer, True)

    def tokens(self, form: bytes = USER) -> Tensor:
        """In a template, in one with the indicator (``INDICATOR``), or in none (``b""``)."""
        if not form:
            return encode(self.request + b"\n" + self.answer)
        return encode(USER + self.request + (form if form == INDICATOR else b"") + ASSISTANT + self.answer)

    def users(self) -> Tensor:
        """Which tokens in the template are the user's, bool."""
        place = torch.arange(len(self.tokens())) - len(USER) - 1
        return (place >= 0) & (place < len(self.request))


def pairs(seed: str, source: bytes) -> Iterator[Pair]:
    """Pages of prose with an answer from memory, and some with a string to copy."""
    rng, names = random.Random(f"pairs/{seed}"), list(FACTS)
    copies = recall.copy(PAGE, seed, haystack=source, size=ANSWER - len("Copy: "))
    while True:
        fact = b"The pass key of %s is %s" % (name := rng.choice(names), FACTS[name])
        known = Pair(window(source, PAGE - ANSWER - 2, rng), fact, False)
        yield Pair.of(next(copies)) if rng.random() < NEEDS else known


def needles(seed: str, source: bytes, count: int) -> list[Pair]:
    """Pass keys hidden in prose, of names that none is known of."""
    stream = map(Pair.of, recall.needle(PAGE, seed, haystack=source))
    return list(islice((p for p in stream if p.answer.split()[4] not in FACTS), count))


def tune(model: Any, texts: Sequence[Tensor], batch: int = 16, rate: float = 1e-3) -> Any:
    """A copy of a model that has learned the answers in ``texts``, in one pass."""
    model = copy.deepcopy(model).train()
    parts = [texts[i : i + batch] for i in range(0, len(texts), batch)]
    solver = torch.optim.Adam(model.parameters(), rate)
    schedule = torch.optim.lr_scheduler.LinearLR(solver, 1.0, 0.0, len(parts))
    for part in parts:
        pad = model.config.pad_token_id
        tokens = pad_sequence([*part], batch_first=True, padding_value=pad, padding_side="left")
        keep = ANSWER + 1
        logits = model(tokens, attention_mask=tokens != pad, use_cache=False, logits_to_keep=keep).logits[:, :-1]
        solver.zero_grad()
        cross_entropy(logits.flatten(0, 1), tokens[:, -ANSWER:].flatten()).backward()
        solver.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def right(model: Any, tokens: Tensor, steering: MethodSystem | None = None) -> Tensor:
    """Whether a model says the digits that end ``tokens [B, N]``, those before given, ``[B]``."""
    with steering.apply(model) if steering else nullcontext():
        logits = model(tokens, use_cache=False, logits_to_keep=DIGITS + 1).logits[:, :-1]
    return (logits.argmax(-1) == tokens[:, -DIGITS:]).all(1)


@torch.no_grad()
def looking(model: Any, some: Sequence[Pair]) -> tuple[Tensor, Tensor]:
    """Attention to the user where the answer's digits begin, ``[S]``: without a template, and with one.

    It is that of the head that looks most at the user without. What the template gets is left out of the whole.
    """
    masses = []
    for form, before, between in ((b"", 0, 1), (USER, len(USER), len(ASSISTANT))):
        start, stop = 1 + before, 1 + before + len(some[0].request)
        regions = {"user": slice(start, stop), "template": [*range(1, start), *range(stop, stop + between)]}
        with watch(model, RegionMass({name: name for name in regions}), regions=regions) as seen:
            model(torch.stack([p.tokens(form) for p in some]), use_cache=False, logits_to_keep=1)
        at = {
            name: torch.cat([s["region_mass"][name][..., -DIGITS - 1] for s in seen.seen.values()], 1)
            for name in regions
        }
        masses.append(at["user"] / (1 - at["template"]))
    head = masses[0].argmax(1, keepdim=True)
    without, within = (mass.gather(1, head)[:, 0] for mass in masses)
    return without, within


def more(a: Tensor, b: Tensor) -> bool:
    """Is ``a`` right more often than ``b``, of the same questions, by two standard errors?"""
    from ...study.probes import outweighs

    return outweighs(int((a & ~b).sum()), int((b & ~a).sum()))
