"""What the claims of prefill selectors measure: real queries and keys, errors, time and answers, on the embedded LM."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ..core import masks
from ..core.attend import attention, explain
from ..core.spec import Attention
from ..hosts.handles import install, listen
from ..worlds import recall, text
from ..zoo import lm
from .claims import interleaved
from .probes import embedded

DENSE = Attention(mask=masks.Causal())
Program = Callable[[int], Attention]  # of a layer


def calls(length: int, start: int = 0) -> list[Any]:
    """The model's attention calls (``q, k, v``) as it reads prose; more than 2048 tokens it was never trained on."""
    return calls_on(text.encode(text.heldout()[start : start + length - 1]))


@torch.no_grad()
def calls_on(tokens: Tensor) -> list[Any]:
    """Those of one text ``[N]``."""
    seen: list[Any] = []
    with listen(model := embedded(), seen.append):
        model(tokens[None], use_cache=False, logits_to_keep=1)
    return seen


def relative_l1(found: Tensor, true: Tensor) -> float:
    """Sum of absolute differences over that of absolute values."""
    return float((found - true).abs().sum() / true.abs().sum())


def error(seen: list[Any], program: Program) -> float:
    """Relative L1 error of a program's outputs against dense attention's: mean over the calls."""
    outs = [(attention(c.q, c.k, c.v, p), attention(c.q, c.k, c.v, DENSE)) for c, p in _with(seen, program)]
    return sum(relative_l1(*pair) for pair in outs) / len(outs)


def speedup(seen: list[Any], program: Program, rounds: int = 2) -> tuple[float, float]:
    """How many times as fast as dense attention (its fastest executor), and the share of the causal half computed."""
    programs = [p for _, p in _with(seen, program)]

    def run(chosen: list[Attention]) -> list[Tensor]:
        return [attention(c.q, c.k, c.v, p) for c, p in zip(seen, chosen, strict=True)]

    times = interleaved({"dense": lambda: run([DENSE] * len(seen)), "ours": lambda: run(programs)}, rounds)
    shares = [2 * explain(p, c.q, c.k, backend="band").visited for c, p in zip(seen, programs, strict=True)]
    return times.ratio("dense", "ours"), sum(shares) / len(shares)


def answers(program: Program | None = None, length: int = 2048, examples: int = 6) -> dict[str, float]:
    """Share of answers that the model gives right, by task, with a program in every layer; without: its own."""
    model = embedded()
    with nullcontext() if program is None else install(model, lambda layer, heads: program(layer)):
        return {task: round(lm.accuracy(model, task, length, examples=examples), 4) for task in recall.TASKS}


def mean(shares: dict[str, float]) -> float:
    """Mean over the tasks."""
    return sum(shares.values()) / len(shares)


def _with(seen: list[Any], program: Program) -> list[tuple[Any, Attention]]:
    return [(call, program(layer)) for layer, call in enumerate(seen)]
