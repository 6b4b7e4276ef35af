"""Attention rollout and attention flow: how much of each input token is in what the last layer says.

With A = (W + I) / 2, W the mean over heads of a layer's weights, and I for the residual connection:

    rollout = A[L] ... A[1]
    flow[i, j] = the most that can flow from query i above the last layer to token j, over edges of capacity A

Raw attention, W of the last layer, tells of the last layer's inputs alone, which are mixtures of tokens by then.

Paper: Quantifying Attention Flow in Transformers, arXiv:2005.00928
Code: https://github.com/samiraabnar/attention_flow (attention_graph_util.py: compute_joint_attention,
    compute_flows; bert_sv.ipynb: blank-out; compute_corel_distilbert_sst.py: Spearman's correlation)

Differs: rows are made, not matrices, and rollout's memory grows with N (:mod:`saccade.hosts.flow`). Where a row of W
does not sum to one, W + I is divided by what it sums to, as in the official code. Spearman's correlation gives ties
their mean rank, as in the official notebook; the official scripts for sentiment rank them densely. Beside a classifier
as in the paper the claim has a causal model, measured first: where nobody looks ahead, more ways lead to early tokens
whatever the weights are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.stats import Rows
from ...hosts.flow import Kept, keep
from ...hosts.handles import watch
from ..base import ClaimNumbers, MethodSystem
from ._classifier import MASK, VOCABULARY, bert, held, opinions

TEXTS, TOKENS = 32, 32  # flow takes half a second for each
BLANK = 258  # the embedded model's padding, a token that says nothing
STEPS = 600

Predict = Callable[[Tensor], Tensor]
"""From tokens ``[B, N]`` to the probability ``[B]`` of what is right."""


class AttentionFlow(MethodSystem):
    """No settings: ``apply(model)`` keeps what a forward attended to; ask it for ``rollout`` or ``flow`` of queries."""

    slug = "attention-flow"
    title = "Attention rollout and attention flow"
    paper = "https://arxiv.org/abs/2005.00928"
    code = "https://github.com/samiraabnar/attention_flow"

    def apply(self, model: nn.Module) -> Kept:
        """Keep queries and keys; the model answers as it would."""
        return keep(model)

    def claim(self) -> ClaimNumbers:
        """Spearman's correlation with blank-out of both, and of raw attention, in a language model and a classifier."""
        from ...study import probes
        from ...worlds.text import text

        model = probes.embedded()
        examples = list(islice(text(TOKENS + 1, "flow"), TEXTS))
        read = [(e.tokens[None, :-1], partial(_next, model, int(e.tokens[-1]))) for e in examples]
        found = {"language_model": self._correlations(model, read, -1, BLANK)}
        reader, sentences = classifier()
        judged = [(tokens, partial(_class, reader, label)) for tokens, label in sentences]
        found["classifier"] = self._correlations(reader, judged, 0, MASK)
        right = sum(float(predict(tokens)) > 0.5 for tokens, predict in judged) / len(judged)
        numbers: dict[str, Any] = {"classifier_is_right": round(right, 3)}
        above: dict[str, bool] = {}
        told = []
        for name, each in found.items():
            *raw, rollout, flow = each.mean(0).tolist()
            numbers[name] = {"raw_by_layer": [round(x, 3) for x in raw]}
            numbers[name] |= {"rollout": round(rollout, 3), "flow": round(flow, 3)}
            told.append(
                f"of a {name.replace('_', ' ')} rollout {rollout:.2f}, flow {flow:.2f}, raw attention {raw[-1]:.2f}"
            )
            for way, values in (("rollout", each[:, -2]), ("flow", each[:, -1])):
                above[f"{way}_above_raw_of_a_{name}"] = probes.surely_positive(values - each[:, -3])
        return ClaimNumbers.decide(
            numbers, f"Correlation with blank-out over {TEXTS} texts each: {'; '.join(told)} (last layer).", **above
        )

    @torch.no_grad()
    def _correlations(self, model: nn.Module, texts: Sequence[tuple[Tensor, Predict]], row: int, blank: int) -> Tensor:
        """Of each text: with blank-out, of raw attention of every layer, rollout and flow: ``[texts, layers + 2]``."""
        from ...study.probes import spearman

        found = []
        for tokens, predict in texts:
            with self.apply(model) as run, watch(model, Rows([row])) as seen:
                model(tokens)
            ways = [seen[site.path]["rows"][0].mean(0)[0] for site in seen.sites]
            ways += [run.rollout([row])[0, 0], run.flow([row])[0, 0]]
            blanked = blank_out(predict, tokens, blank)
            found.append(torch.tensor([spearman(way, blanked) for way in ways], dtype=torch.float64))
        return torch.stack(found)


def _next(model: Any, said: int, tokens: Tensor) -> Tensor:
    return model(tokens, use_cache=False).logits[:, -1].softmax(-1)[:, said]


def _class(model: Any, label: int, tokens: Tensor) -> Tensor:
    return model(tokens).logits.softmax(-1)[:, label]


def classifier() -> tuple[Any, list[tuple[Tensor, int]]]:
    """A small BERT trained to tell praise from blame, and sentences ``[1, N]`` with their labels."""
    from ...study.progress import bar
    from ...study.trainer import Recipe, Task, fit

    def marked(tokens: Tensor) -> Tensor:
        return F.pad(tokens, (1, 0), value=VOCABULARY)  # the token from which the class is read

    def loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        return F.cross_entropy(model(marked(batch[0])), batch[1])

    torch.manual_seed(0)
    reader = bert(VOCABULARY + 1, 2, 4, initializer_range=0.1)
    with bar(STEPS) as tell:
        fit(reader, Task(opinions, loss, lambda: held(1)), Recipe(STEPS, lr=1e-3), 0, tell=tell)
    tokens, labels, _ = held(1)[0]
    return reader.eval().model, [
        (marked(row[row != 0][None]), int(label)) for row, label in islice(zip(tokens, labels, strict=True), TEXTS)
    ]


@torch.no_grad()
def blank_out(predict: Predict, tokens: Tensor, blank: int) -> Tensor:
    """By how much what is predicted of tokens ``[1, N]`` changes with each of them blanked: ``[N]``."""
    blanked = tokens.expand(tokens.shape[1], -1).clone().fill_diagonal_(blank)
    after = predict(torch.cat([tokens, blanked]))
    return (after[1:] - after[0]).abs()
