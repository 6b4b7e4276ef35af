"""Circuit reuse: which heads solve a task, which of them solve another one, and a task repaired by its heads alone.

Path patching, at a prompt's last token. ``metric`` is logit(right) - logit(wrong), mean over prompts; ``other`` asks
the same page for what is wrong here:

    effect[sender] = (metric(patched) - metric(tokens)) / (metric(other) - metric(tokens))

patched to the logits: the sender's output comes from ``other``, all other heads' from ``tokens``; MLPs run. Patched to
the receivers' queries: they are what they become in that run, in a run of ``tokens`` where nothing else is touched. The
circuit is the strongest heads of two stages: those that move the logits, and those that move these heads' queries.
Repair: the last query of some heads looks at one place alone.

Paper: Circuit Component Reuse Across Tasks in Transformer Language Models, arXiv:2310.08744
Code: https://github.com/jmerullo/circuit_reuse (patching_utils.py: path_patching)

Differs: the tasks. The embedded model knows no indirect objects: here a pass key and a variable are recalled, of which
it was trained on the first. The paper has more stages, one of them at another token, and takes the top 2% of 384
heads; here ``TOP`` of 36. Tokens before the last, which nothing patches, are read once and kept in a cache.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import AbstractContextManager
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from ...core import edits
from ...core.stats import Rows
from ...core.tile import At
from ...hosts.handles import watch
from ..base import ClaimNumbers, MethodSystem
from ._heads import Heads, edited, pairs
from ._patching import TOP, circuit
from ._prompts import KNOWN, NEW, Prompts, ask

REUSED, REPAIRED = 0.5, 0.5  # heads in both circuits, of those in either; share of the errors that must go


class CircuitReuse(MethodSystem):
    """Settings: ``heads``, the (layer, head) pairs to repair, and ``places``: for each text the key they look at."""

    slug = "circuit-reuse"
    title = "Circuit component reuse: path patching and repair"
    paper = "https://arxiv.org/abs/2310.08744"
    code = "https://github.com/jmerullo/circuit_reuse"

    def __init__(self, heads: Heads = ((0, 0),), places: int | Sequence[int] = 0):
        self.heads, self.places = heads, places

    def apply(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Let the heads' last query look there. Raises SpecError if the model has no such layer or head."""
        return edited(model, LookAt(self.places), self.heads)

    def claim(self) -> ClaimNumbers:
        """Circuits of two recall tasks, what they share, and the second repaired by four heads of the first."""
        from ...study import probes

        model = probes.embedded()
        known, new = (ask(form, 48) for form in (KNOWN, NEW))
        first, second = (circuit(model, prompts) for prompts in (known, new))
        union, both = {*first, *second}, {*first} & {*second}
        mass = looks(model, known)
        chosen = sorted(first, key=lambda pair: -float(mass[pair]))[:TOP]
        rest = [pair for pair in pairs(mass) if pair not in union]
        draws = [random.Random(i).sample(rest, TOP) for i in range(8)]
        right, repaired = accuracy(model, new), accuracy(model, new, chosen)
        others = fmean(accuracy(model, new, draw) for draw in draws)
        shared = len(both) / len(union)
        shares = {"shared": shared, "accuracy_known": accuracy(model, known), "accuracy": right}
        shares |= {"accuracy_repaired": repaired, "accuracy_others": others}
        return ClaimNumbers.decide(
            {name: round(value, 3) for name, value in shares.items()}
            | {"first": [*map(list, first)], "second": [*map(list, second)], "repairing": [*map(list, chosen)]},
            f"Of {len(union)} heads in either circuit {shared:.0%} are in both. On the task it was not trained on the"
            f" model is right in {right:.1%}; with {TOP} heads of the other task's circuit that look at the answer, in"
            f" {repaired:.1%}; with as many heads of neither circuit, in {others:.1%}.",
            mostly_reused=shared >= REUSED,
            repair_removes_half_of_the_errors=1 - repaired <= (1 - REPAIRED) * (1 - right),
            other_heads_do_not_repair=others - right <= (repaired - right) / 2,
        )


class LookAt(edits.Edit):
    """The last query of a call looks at one key of each text alone; the queries before it as they do."""

    def __init__(self, places: int | Sequence[int]):
        super().__init__()
        self.places = torch.as_tensor(places)

    def forward(self, weights: Tensor, at: At, visible: Tensor | None) -> Tensor:
        there = self.places.to(weights.device)
        alone = (at.k == (there[at.b] if there.ndim else there)).to(weights)
        return torch.where(at.q == at.n - 1, alone, weights)


@torch.no_grad()
def looks(model: Any, prompts: Prompts) -> Tensor:
    """Mean weight of the answer's place in every head's last query ``[layers, H]``."""
    with watch(model, Rows([-1]), kind="self") as watching:
        model(prompts.tokens, use_cache=False, logits_to_keep=1)
    rows = torch.stack([watching.seen[site.path]["rows"][:, :, 0] for site in watching.sites])
    return rows[:, torch.arange(len(prompts.places)), :, prompts.places].mean(0)


@torch.no_grad()
def accuracy(model: Any, prompts: Prompts, repaired: Heads = ()) -> float:
    """Share of right next tokens, while some heads look at the answer."""
    with CircuitReuse(repaired, prompts.places).apply(model):
        said = model(prompts.tokens, use_cache=False, logits_to_keep=1).logits[:, -1].argmax(-1)
    return float((said == prompts.right).float().mean())
