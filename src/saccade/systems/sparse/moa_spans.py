"""MoA: every head has a window of its own length, which grows with the text by a rule of the head's own.

    span[h]     = alpha[h] + beta[h] * length
    visible[h]  = (k <= q) and (q // block - k // block < max(1, span[h] // block)  or  k < block)

Rules are chosen for a model. With A the weights of a head and g the gradient of the loss with respect to them, what a
key does to the loss when it is hidden from a query, to first order and with the row's other weights made up for, is

    influence[q, k] = | A[q, k] * (g[q, k] - sum_j A[q, j] * g[q, j]) / (1 - A[q, k]) |

and the chosen rules hide the least influence such that the mean span keeps to ``density * length``.

Paper: MoA: Mixture of Sparse Attention for Automatic Large Language Model Compression, arXiv:2406.14909
Code: https://github.com/thu-nics/MoA (MoA/models/llama/modify_llama_profile.py: influence; MoA/universal/
    elastic_block_sparse.py: layout, loss and cost; MoA/universal/optimizer.py; scripts/pipeline/elastic_generate.py:
    the rules, density 0.5, 9 betas; MoA/attention/cache_utils.py: length = prompt + new tokens)

Differs: the official solver keeps the Pareto front of the losses at several lengths, and allows two rules a layer; then
the plan with the least loss at an unseen length is taken. Here the sum of the losses is minimized, with any rules, and
exactly, by dynamic programming. The density is bounded at the longest profile and at the longest text; the official
solver also bounds it at every profile, and from below at 0.9 of the bound (here a plan may use less). The layout, its
loss and its cost are the official ones, in blocks. ``length=None`` takes the keys of each call for the length, and then
neither decoding nor padding is promised. The default rules are an example.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ...core import masks
from ...core.errors import SpecError
from ...core.masks import Mask, Span
from ...core.spec import Attention
from ...core.tile import At
from ...hosts.handles import install
from ...worlds import recall
from ..base import ClaimNumbers, Promises, System
from .block_masks import NearBlocks

Rule = tuple[float, float]
GAIN = 1.5  # the least of the paper's gains in retrieval over the uniform window


def window(rule: Rule, length: int, block: int) -> int:
    """Blocks of the window, the query's own included."""
    return max(1, int((rule[0] + rule[1] * length) // block))


def cost(rule: Rule, length: int, block: int) -> int:
    """Blocks of the longest row, the sinks' included."""
    return min(window(rule, length, block) + 1, length // block)


class Elastic(Mask):
    """:class:`NearBlocks` by a rule ``(alpha, beta)`` per head; ``length=None``: the number of keys of each call."""

    def __init__(self, size: int, rules: Sequence[Rule], length: int | None):
        super().__init__()
        if size < 1 or not rules:
            raise SpecError(f"Elastic needs a size of at least 1 and a rule per head; got {size} and {rules}")
        self.size, self.rules, self.length = size, tuple(rules), length

    def near(self, keys: int, device: torch.device) -> NearBlocks:
        """The windows at a length."""
        length = self.length or keys
        counts = [window(rule, length, self.size) for rule in self.rules]
        return NearBlocks(self.size, torch.tensor(counts, device=device))

    def visible(self, at: At) -> Tensor:
        return self.near(at.m, at.k.device).visible(at)

    def blocks(self, span: Span) -> Tensor:
        return self.near(span.m, span.k_lo.device).blocks(span)


class MoaSpans(System):
    """Settings: ``rules``, an ``(alpha, beta)`` per head of one layer, cycled over; ``block``; ``length``."""

    slug = "moa-spans"
    title = "MoA (a span per head)"
    paper = "https://arxiv.org/abs/2406.14909"
    code = "https://github.com/thu-nics/MoA"
    promises = Promises(unit_rows=True, training_free=True, needs_training=False)

    def __init__(self, rules: Sequence[Rule] = ((0.0, 0.25), (0.0, 0.75)), block: int = 64, length: int | None = 2048):
        self.rules, self.block, self.length = rules, block, length

    def promised(self) -> Promises:
        """No decoding and no padding where the spans follow the number of keys."""
        fixed = self.length is not None
        return replace(self.promises, decodes=fixed, padding=fixed)

    def build(self, heads: int) -> Attention:
        """The windows and one block of sinks, causal. Raises SpecError without rules or for a block below 1."""
        rules = [self.rules[head % len(self.rules)] for head in range(heads)] if self.rules else []
        seen = Elastic(self.block, rules, self.length) | masks.Sinks(self.block)
        return Attention(mask=masks.Causal() & seen)

    def claim(self) -> ClaimNumbers:
        """Rules for the embedded model from copying and recall at 512 and 1024; needles found at 1024 and 2048."""
        from ...study.probes import embedded
        from ._span_plan import profile, search

        model, lengths, density = embedded(), (512, 1024), 0.5
        maps = []
        for n in lengths:
            pages = [page for task in (recall.copy, recall.recall) for page in islice(task(n, "profile"), 4)]
            maps.append(profile(model, pages, self.block))
        plan = search(maps, lengths, 2048, density, self.block)
        numbers: dict[str, Any] = {}
        right: dict[str, list[bool]] = {"dense": [], "uniform": [], "moa": []}
        for n in (1024, 2048):
            spans = [cost(rule, n, self.block) for layer in plan for rule in layer]
            numbers[f"density_{n}"] = round(sum(spans) / len(spans) / (n // self.block), 4)
            programs: dict[str, Any] = {
                "dense": None,
                "uniform": MoaSpans([(density * n - self.block, 0.0)], self.block, n).build(6),  # and a block of sinks
                "moa": lambda layer, heads, n=n: MoaSpans(plan[layer], self.block, n).build(heads),
            }
            for name, program in programs.items():
                found = _needles(model, n, program)
                numbers[f"{name}_{n}"] = round(sum(found) / len(found), 3)
                right[name] += found
        dense, uniform, ours = (sum(x) / len(x) for x in right.values())
        return ClaimNumbers.decide(
            numbers | {"dense": round(dense, 3), "uniform": round(uniform, 3), "moa": round(ours, 3)},
            f"With a mean span of at most half the text, {ours:.0%} of the needles are found with a span per head and"
            f" {uniform:.0%} with the same span in every head ({dense:.0%} dense).",
            equal_span=all(numbers[f"density_{n}"] <= density for n in (1024, 2048)),
            more_needles=ours >= GAIN * uniform,
        )


@torch.no_grad()
def _needles(model: Any, length: int, program: Any) -> list[bool]:
    """Of 24 needles, which does the model find, its attention being this program (``None``: its own)?"""
    from ...zoo.lm import exact

    found: list[bool] = []
    with nullcontext() if program is None else install(model, program):
        for page in islice(recall.needle(length, "test"), 24):
            found += exact(model(page.tokens[None], use_cache=False).logits[0], page)
    return found
