"""What the claims of sparse systems measure: operations by length; needles, and great scores, found inside the
embedded model."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice

import torch
from torch import Tensor

from ..core.attend import attention
from ..core.selectors import Select, Selection
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


class Recall(Select):
    """Chooses as another selector does, and notes which share of the newest query's greatest scores is visited.

    Args:
        select: the selector, of causal attention.
        count: how many scores.
        window: newest keys that are always visited.

    Attributes:
        noted: the shares of every call; of what is "chosen", and of as many keys that are "local", or of which those
            before the window are "strided".
    """

    def __init__(self, select: Select, count: int, window: int):
        super().__init__(select.rows, select.columns)
        self.select, self.count, self.window = select, count, window
        self.noted: dict[str, list[float]] = {"chosen": [], "local": [], "strided": []}

    def choose(self, q: Tensor, k: Tensor, codes: Tensor) -> Selection:
        found = self.select.choose(q, k, codes)
        m = k.shape[2]
        score = q[:, :, -1:] @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT
        best = score.topk(self.count, -1).indices
        chosen = Selection(found.blocks[:, :, -1:], 1, self.columns).dense(1, m)
        size = int(chosen.sum(-1).max())
        age = torch.arange(m - 1, -1, -1)
        every = (m - self.window) / (size - self.window)
        strided = (age < self.window) | ((age - self.window) % every < 1)
        for name, seen in (("chosen", chosen), ("local", age < size), ("strided", strided)):
            self.noted[name].append(float(seen.expand(score.shape).gather(-1, best).float().mean()))
        return found

    def means(self) -> dict[str, float]:
        """Over the calls, by name."""
        return {name: sum(shares) / len(shares) for name, shares in self.noted.items()}
