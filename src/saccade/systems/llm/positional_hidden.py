"""Positional hidden states: a dimension of the hidden state that tells a token's place is scaled for the last query.

    h'[t, p] = factor * h[t, p]   for the dimensions p in dims, h[t] otherwise
    q, k     = Wq h', Wk h'       for the last query; Wq h, Wk h for all others; v = Wv h for all

h is what the attention module is given (after the norm). Causal attention alone makes such dimensions: their mean over
many texts rises or falls with position in layer after layer. Attention that reads them prefers some positions.

Paper: Mitigate Position Bias in Large Language Models via Scaling a Single Dimension, arXiv:2406.02536
Code: https://github.com/PositionalHidden/PositionalHidden
    (positional_hidden/models/modeling_llama_hidden_scale.py, experiments/search_dimension/seach_dim_by_statistic.py)

Differs: the official defaults name the dimension and the layers 10 to 25 of 32 by hand; here the layers follow the
depth in that proportion, and dims=None takes the first that the search finds. As there, the cache holds scaled keys
and a decoded token is scaled; a longer chunk on a filled cache is too, where the official code forgets the past.
Its options change_value and skip_first (off in all its configurations) are left out. The search never counts the
embedding (official: kept if the number of layers is odd), takes all layers where dropping the first two and the last
leaves none, draws random tokens for random strings, and smooths without the curve's edges.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ...core.errors import SpecError, Unsupported
from ...hosts.acts import pick
from ...hosts.handles import host_of
from ..base import ClaimNumbers, MethodSystem
from ._positional_dims import positional_dims


class PositionalHidden(MethodSystem):
    """Settings: ``dims`` (``None``: the first of :func:`positional_dims`), ``factor``, ``layers`` as ``install`` takes
    them (``None``: the middle half), ``last``, how many queries at the end of the prompt read the scaled state.
    """

    slug = "positional-hidden"
    title = "Positional hidden states, one dimension scaled"
    paper = "https://arxiv.org/abs/2406.02536"
    code = "https://github.com/PositionalHidden/PositionalHidden"

    def __init__(self, dims: Sequence[int] | None = None, factor: float = 0.0, layers: Any = None, last: int = 1):
        self.dims, self.factor, self.layers, self.last = dims, factor, layers, last

    @contextmanager
    def apply(self, model: Any) -> Iterator[Sequence[int]]:
        """Scale until the context is left; gives the dimensions.

        Raises:
            SpecError: ``last`` or a dimension is out of range, or ``dims`` is ``None`` and the search finds none.
            Unsupported: queries and keys come from one projection.
        """
        dims = positional_dims(model)[:1] if self.dims is None else self.dims
        size = model.config.get_text_config().hidden_size
        if self.last < 1 or not dims or not all(-size <= d < size for d in dims):
            found = "the search found none" if self.dims is None else f"got {dims} and last={self.last}"
            raise SpecError(f"PositionalHidden: expected dims below {size}, at least one, and last >= 1; {found}")
        sites = host_of(model).sites()
        count = max(site.layer for site in sites) + 1
        middle = slice(round(count * 10 / 32), round(count * 26 / 32))
        with ExitStack() as stack:
            for site in pick(sites, type(model).__name__, middle if self.layers is None else self.layers, "self"):
                self._hook(site.module, list(dims), stack)
            yield dims

    def _hook(self, attention: nn.Module, dims: list[int], stack: ExitStack) -> None:
        if not (hasattr(attention, "q_proj") and hasattr(attention, "k_proj")):
            raise Unsupported(f"{type(attention).__name__} has no q_proj and k_proj of its own to give a scaled state")
        plain = False

        def scale(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
            if plain:
                return None
            state = args[0].clone()
            state[..., dims] *= self.factor
            return (state,)

        def merge(module: nn.Module, args: Any, given: dict[str, Any], found: tuple[Any, ...]) -> tuple[Any, ...]:
            """The module ran with every query and key scaled: all queries but the last run again, unscaled."""
            nonlocal plain
            scaled, cache = found[0], given.get("past_key_values")
            new = scaled.shape[1]
            seen = new if cache is None else cache.get_seq_length(module.layer_idx)
            if seen > new or new <= self.last:
                return found
            plain = True
            try:
                own = module.forward(*args, **(given | {"past_key_values": None}))[0]
            finally:
                plain = False
            return torch.cat([own[:, : new - self.last], scaled[:, new - self.last :]], 1), *found[1:]

        for projection in (attention.q_proj, attention.k_proj):
            stack.callback(projection.register_forward_pre_hook(scale).remove)  # type: ignore[union-attr]
        stack.callback(attention.register_forward_hook(merge, with_kwargs=True).remove)

    def claim(self) -> ClaimNumbers:
        """Losses by the depth of the evidence, with the best of the searched dimensions and without.

        The search is the paper's: candidates by their course, then the one with the least loss on held-out questions.
        """
        from ...study import curves, probes

        model = probes.embedded()
        candidates = positional_dims(model, samples=40)[:10]
        if not candidates:
            return ClaimNumbers.decide({"candidates": []}, "No dimension's mean is monotone in position.", found=False)

        def run(tokens: Tensor, keep: int) -> Tensor:
            return model(tokens[None], use_cache=False, logits_to_keep=keep).logits[0]

        validation = {}
        for dim in candidates:
            with PositionalHidden([dim], self.factor, last=2).apply(model):
                validation[dim] = float(curves.position_curve(run, 512, 2, seed=0)[0].mean())
        best = min(validation, key=lambda dim: validation[dim])
        before = curves.position_curve(run, 1024, 16, seed=1)
        with PositionalHidden([best], self.factor, last=2).apply(model):
            after = curves.position_curve(run, 1024, 16, seed=1)
        what = f"With dimension {best} scaled by {self.factor:g} for the last queries"
        found = curves.judge(before, after, "unscaled", what)
        return replace(found, numbers={"candidates": candidates, "dimension": best} | found.numbers)
