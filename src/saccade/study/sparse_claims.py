"""What the claims of sparse systems measure: operations by length, and needles found inside the embedded model."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice

import torch

from ..core.attend import attention
from ..core.spec import Attention
from ..hosts.handles import install
from ..worlds import recall
from .laws import Work
from .probes import embedded


def operations(spec: Attention, n: int) -> int:
    """Counted operations of one head of 64 on ``n`` tokens drawn from a normal distribution, tiled and forward."""
    q, k, v = torch.randn(3, 1, 1, n, 64, generator=torch.Generator().manual_seed(0)).unbind(0)
    with torch.no_grad(), Work() as work:
        attention(q, k, v, spec, backend="band")
    return work.count


@torch.no_grad()
def needles_kept(program: Callable[[int, int], Attention], length: int, examples: int) -> float:
    """Of the needles that the embedded model answers, the share it still does with ``program(layer, heads)`` in it."""
    model = embedded()

    def answers(example: recall.Example) -> bool:
        answer = example.answers[0]
        logits = model(example.tokens[None, :-1], use_cache=False, logits_to_keep=answer.stop - answer.start).logits[0]
        return torch.equal(logits.argmax(-1), example.tokens[answer.start :])

    known = [example for example in islice(recall.needle(length, 5), examples) if answers(example)]
    with install(model, program):
        return sum(map(answers, known)) / len(known)
