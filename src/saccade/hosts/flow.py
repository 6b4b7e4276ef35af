"""What a model's output draws from its input through all layers: attention rollout, relevance, attention flow.

With ``W`` the weights of a layer, their mean taken over heads, and ``G`` the gradient of a score by them:

    rollout    A[L] ... A[1],            A = (mean W + I) / (sums of its rows)
    relevance  (I + C[L]) ... (I + C[1]),  C = mean of max(0, G * W)
    flow       the most that flows from a query above layer L to a token below layer 1 if an edge carries at most A

Of the two products rows are made, from the last layer down: each step is a row times the matrix of one layer, which
the engine computes in tiles from the queries and keys that were kept. G is the product of the gradient by attention's
output and the values, so it needs no matrix either: memory grows with N. The edges of flow are the greatest weights of
each row, so its graph grows with N too; but it takes a maximum flow for each token, and so time.

Rollout, flow: Quantifying Attention Flow in Transformers, arXiv:2005.00928, sections 3.1 to 3.3, and
    https://github.com/samiraabnar/attention_flow (attention_graph_util.py).
Relevance: Generic Attention-model Explainability, arXiv:2103.15679, equations 5 and 6, and
    https://github.com/hila-chefer/Transformer-MM-Explainability (rules 5 and 6 of ExplanationGenerator.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.attend import attention
from ..core.errors import SpecError
from ..core.masks import Causal, Full
from ..core.spec import Attention
from ..core.stats import Stat, TopK
from ..core.tile import Tile, per_row
from . import acts
from .acts import Call
from .handles import Handle

SCALE = 1 << 24  # of capacities: scipy's maximum flow counts in integers


def keep(model: nn.Module, *, layers: Any = None, kind: Any = "self") -> Kept:
    """Keep the queries and keys of a model's forward, until the handle is closed.

    Args:
        model, layers, kind: as for :func:`saccade.install`. The layers must follow one another over the same tokens.

    Returns:
        A context manager. After a forward ask it for :meth:`Kept.rollout`, :meth:`Kept.relevance` or
        :meth:`Kept.flow`. Programs and edits that are installed are seen as they ran.
    """
    return Kept(model, layers, kind)


class Kept(Handle):
    """The attention of a model's last forward: queries, keys, values and programs of each layer, no weights."""

    def __init__(self, model: nn.Module, layers: Any, kind: Any):
        self._layers: list[_Layer] = []
        super().__init__(model, layers, None, kind, lambda site: {"see": self._see})
        self._hook = model.register_forward_pre_hook(lambda *_: self._layers.clear())

    def __enter__(self) -> Kept:
        return self

    def _see(self, call: Call, told: dict[str, Any]) -> None:
        state: acts.Acts = call.site.module.__dict__[acts.STATE]
        self._layers.append(_Layer(call, state.ran(call)))

    def _forget(self) -> None:
        super()._forget()
        self._hook.remove()

    @torch.no_grad()
    def rollout(self, rows: Sequence[int]) -> Tensor:
        """Attention rollout of some queries (negative ones count from the end): ``[B, len(rows), N]``, rows sum to 1.

        Raises:
            SpecError: no forward was run, or its layers attend over different tokens.
        """
        drawn = self._start(rows)
        for layer in reversed(self._layers):
            drawn = drawn / (1 + layer.row_sums())[:, None]
            drawn = drawn + layer.draw(drawn)
        return drawn

    def relevance(self, score: Tensor, rows: Sequence[int]) -> Tensor:
        """Gradient-weighted rollout of some queries for a score: ``[B, len(rows), N]``.

        Args:
            score: a number that was computed from what the model's forward returned.
            rows: the queries from which the score was computed; negative ones count from the end.

        Raises:
            SpecError: as for :meth:`rollout`, or the forward was run without gradients.
        """
        drawn = self._start(rows)
        outs = [layer.call.out for layer in self._layers]
        if not (score.requires_grad and all(out.requires_grad for out in outs)):
            raise SpecError(
                "relevance: the score has no gradient by every layer's attention. Run the model outside of"
                " torch.no_grad(), its parameters with requires_grad, and compute the score from its output"
            )
        grads = torch.autograd.grad(score, outs, retain_graph=True, materialize_grads=True)
        with torch.no_grad():
            for layer, grad in zip(reversed(self._layers), reversed(grads), strict=True):
                drawn = drawn + layer.draw(drawn, grad)
        return drawn

    @torch.no_grad()
    def flow(self, rows: Sequence[int], edges: int = 64) -> Tensor:
        """Attention flow of some queries: ``[B, len(rows), N]``, rows sum to 1.

        Args:
            rows: the queries; negative ones count from the end.
            edges: of a head's row the greatest so many weights are edges (all, of inputs no longer). What is left out
                only lowers the flow, and memory grows with N.

        One maximum flow for each token that the query can reach: minutes for a thousand tokens.

        Raises:
            SpecError: as for :meth:`rollout`.
        """
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import maximum_flow

        start = self._start(rows)
        n, top = start.shape[-1], len(self._layers)
        found = torch.zeros_like(start)
        graphs: list[list[Tensor]] = [[] for _ in start]  # from, to and capacity of edges
        for above, layer in enumerate(self._layers, 1):
            capacity, key = layer.best(min(edges, n))  # [B, N, H * edges]
            total = (1 + layer.row_sums()).expand(len(start), n)
            itself = torch.arange(n, device=key.device)[:, None]
            for b, graph in enumerate(graphs):
                weight = torch.nn.functional.pad(capacity[b], (0, 1), value=1.0) / total[b, :, None]
                to = torch.cat([key[b], itself], -1)
                graph.append(
                    torch.stack([(itself + above * n).expand_as(to), to + (above - 1) * n, weight])[:, to >= 0]
                )
        for b, graph in enumerate(graphs):
            source, to, weight = torch.cat(graph, 1).cpu().double().numpy()
            size = ((top + 1) * n,) * 2
            whole = coo_array((weight * SCALE, (source.astype(int), to.astype(int))), size).tocsr()  # heads add up
            whole.data = whole.data.round()
            whole = whole.astype("int32")
            for r, row in enumerate(start[b].argmax(-1).tolist()):
                for j in range(n):
                    found[b, r, j] = maximum_flow(whole, top * n + row, j).flow_value / SCALE
        return found / found.sum(-1, keepdim=True)

    def _start(self, rows: Sequence[int]) -> Tensor:
        """Rows of the identity ``[B, len(rows), N]``."""
        if not self._layers:
            raise SpecError("nothing was kept: run the model inside the context first")
        sizes = {layer.call.q.shape[2] for layer in self._layers} | {layer.call.k.shape[2] for layer in self._layers}
        if len(sizes) > 1:
            raise SpecError(
                f"layers can follow one another over the same tokens alone; these attend over {sorted(sizes)}: choose"
                " some with layers= or kind=, and run the whole input in one call"
            )
        (n,) = sizes
        outside = [row for row in rows if not -n <= row < n]
        if outside or not len(rows):
            raise SpecError(f"rows: expected some of {n} queries, got {list(rows)}")
        first = self._layers[0].call.q
        identity = torch.nn.functional.one_hot(torch.tensor([row % n for row in rows], device=first.device), n)
        return identity.to(torch.promote_types(first.dtype, torch.float32)).expand(len(first), -1, -1)


@dataclass(frozen=True, eq=False)
class _Layer:
    """One call of an attention module, and its programs by head."""

    call: Call
    programs: list[tuple[tuple[int, ...] | None, Attention]]

    def draw(self, rows: Tensor, grad: Tensor | None = None) -> Tensor:
        """Rows ``[B, R, N]`` times the mean over heads of the weights (times their gradients): ``[B, R, M]``."""
        by = None if grad is None else (grad, self.call.v)
        stats = [Drawn(row, by, name=str(i)) for i, row in enumerate(rows.unbind(1))]
        found = self._look(stats)
        return torch.stack([found[stat.label].mean(1) for stat in stats], 1).to(rows.dtype)

    def row_sums(self) -> Tensor:
        """Sums of the rows of the mean over heads, ``[B, N]`` or, where all are alike, ``[1, 1]``."""
        if all(_sums_to_one(spec) for _, spec in self.programs):
            return torch.ones(1, 1, device=self.call.q.device)
        return self._look([RowMass()])["row_mass"].mean(1)

    def best(self, count: int) -> tuple[Tensor, Tensor]:
        """The greatest weights of each head's rows over the number of heads, and their keys, ``[B, N, H * count]``.

        Where there are fewer: 0 and -1.
        """
        weights, keys = (x.transpose(1, 2).flatten(2) for x in self._look([TopK(count)])["top_k"])
        return weights / self.call.q.shape[1], keys

    def _look(self, stats: Sequence[Stat]) -> dict[str, Any]:
        """What stats see, by name: ``[B, H, ...]``."""
        q, k = self.call.q.detach(), self.call.k.detach()
        whole: dict[str, Any] = {}
        for heads, spec in self.programs:
            _, seen = attention(q, k, k[..., :1], spec, stats=stats, offset=self.call.frame.offset)
            for name, found in seen.items():
                if heads is None:
                    whole[name] = found
                    continue
                pairs = zip(whole[name], found, strict=True) if isinstance(found, tuple) else [(whole[name], found)]
                for into, part in pairs:
                    into[:, list(heads)] = part[:, list(heads)]
        return whole


def _sums_to_one(spec: Attention) -> bool:
    """Does every row of a program's weights surely sum to one?"""
    sees = isinstance(spec.mask, (Full, Causal)) and spec.select is None  # something, at least itself
    return sees and spec.normalizer.unit_rows and not spec.changes


class RowMass(Stat):
    """Sum of each row's weights, ``[B, H, N]``."""

    def see(self, tile: Tile) -> tuple[Tensor, ...]:
        """Sums over the keys."""
        return (tile.weights.sum(-1),)


class Drawn(Stat):
    """What a row of queries draws from each key: ``rows`` ``[B, N]`` times the weights, ``[B, H, M]``.

    Args:
        rows: how much each query counts.
        by: the gradient of a score by attention's output ``[B, H, N, D]``, and the values ``[B, Hkv, M, D]``. Then the
            weights are multiplied by their gradients, and products below 0 left out.
        name: key of the result.
    """

    axis = "keys"

    def __init__(self, rows: Tensor, by: tuple[Tensor, Tensor] | None = None, name: str | None = None):
        super().__init__(name)
        self.rows, self.by = rows, by

    def see(self, tile: Tile) -> tuple[Tensor, ...]:
        """A row times the tile."""
        weights, at = tile.weights, tile.at
        if self.by is not None:
            grad, values = self.by
            queries = grad[at.b, at.h, at.q].squeeze(3)  # [g, r, n, D]
            keys = values[at.b, at.h // (grad.shape[1] // values.shape[1]), at.k].squeeze(2)  # [g, r, m, D]
            weights = (weights * (queries @ keys.mT)).clamp_(min=0)
        rows = per_row(self.rows[:, None], at, "rows").to(weights.dtype).expand(*weights.shape[:3], 1)
        return ((rows.mT @ weights).squeeze(2),)
