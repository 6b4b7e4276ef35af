"""Runs a causal program over long sequences: stretch by stretch, forward, and backward by recomputation.

What is kept for the backward pass is the state before each stretch, so memory is linear in N; within a stretch it is
autograd over the form. A stretch is so short that it stays in the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .forms import by_tokens, in_chunks
from .spec import LinearAttention

CHUNK = 64  # tokens: measured on two cores for D = 64 (docs/linear.md)
STRETCH = 4096  # tokens times heads done at once: few enough for the cache, enough for both cores
ABREAST = 4  # heads done at once, at least: fewer chunks of more heads, since states are summed chunk by chunk
MANY = 16  # as much on a GPU, times this (not tuned)


class Streams(NamedTuple):
    """The inputs, batch and heads flattened: ``q, k [G, N, D]``, ``v [G, N, Dv]``, ``beta [G, N]``, and log-decays
    ``[G]``, ``[G, N]`` or ``[G, N, F]``."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    beta: Tensor | None

    def cut(self, rows: slice, time: slice) -> Streams:
        """Some heads, for some time."""
        return Streams(*(None if x is None else piece(x, rows, time) for x in self))  # type: ignore[arg-type]


def piece(x: Tensor, rows: slice, time: slice) -> Tensor:
    """Some heads of a stream, for some time; a constant has no time."""
    return x[rows, time] if x.ndim > 1 else x[rows]


class Stretch(NamedTuple):
    """Tokens that are done at once, in chunks of a size that divides their number."""

    time: slice
    chunk: int


@dataclass(frozen=True)
class Plan:
    """How a call is cut: heads into groups, time into stretches."""

    form: Callable[..., tuple[Tensor, Tensor]]
    groups: list[slice]
    stretches: list[Stretch]

    @staticmethod
    def of(form: str, spec: LinearAttention, streams: Streams) -> Plan:
        """The plan for a form."""
        rows, n = streams.q.shape[:2]
        if form == "recurrent":
            return Plan(by_tokens, [slice(0, rows)], stretches(n, CHUNK, 1))
        if form == "parallel":
            return Plan(in_chunks, groups(rows, max(1, 2**22 // n**2)), [Stretch(slice(0, n), n)])
        budget, abreast = STRETCH, ABREAST
        if spec.delta or (streams.log_decay is not None and streams.log_decay.ndim == 3):
            abreast *= 2  # chunk after chunk in Python: small products need company
        budget *= 1 if streams.q.device.type == "cpu" else MANY
        at_once = min(rows, max(abreast, budget // n))
        tokens = max(CHUNK, budget // at_once // CHUNK * CHUNK)
        return Plan(in_chunks, groups(rows, at_once), stretches(n, tokens, CHUNK))


def groups(rows: int, at_once: int) -> list[slice]:
    """All rows, so many at once."""
    return [slice(start, min(start + at_once, rows)) for start in range(0, rows, at_once)]


def stretches(n: int, tokens: int, chunk: int) -> list[Stretch]:
    """All tokens: stretches of whole chunks, and the rest as one shorter chunk."""
    whole = n // chunk * chunk
    cut = [Stretch(time, chunk) for time in groups(whole, tokens)]
    return cut + ([Stretch(slice(whole, n), n - whole)] if whole < n else [])


def wide(dtype: torch.dtype) -> torch.dtype:
    """What is accumulated in: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def mapped(spec: LinearAttention, heads: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Features of queries and keys, and the values; with a column of ones if their weights are to be summed."""
    q, k, v = (x.to(wide(x.dtype)) for x in (q, k, v))
    q = spec.feature.query(q, heads)
    if spec.scale != 1:
        q = q * spec.scale
    if spec.normalize:
        v = torch.cat([v, v.new_ones(*v.shape[:-1], 1)], -1)
    return q, spec.feature.key(k, heads), v


def divided(spec: LinearAttention, out: Tensor) -> Tensor:
    """Without the column of sums, divided by it."""
    return out[..., :-1] / (out[..., -1:] + spec.eps) if spec.normalize else out


def advance(
    spec: LinearAttention, plan: Plan, heads: Tensor, streams: Streams, state: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    """One stretch: what is read ``[g, n, Dv]``, and the state after."""
    q, k, v = mapped(spec, heads, streams.q, streams.k, streams.v)
    beta = None if streams.beta is None else streams.beta.to(q.dtype)
    if beta is not None and not spec.delta:
        k, beta = k * beta[..., None], None
    out, state = plan.form(q, k, v, streams.log_decay, beta, state, chunk)
    return divided(spec, out), state


def run(spec: LinearAttention, plan: Plan, heads: Tensor, streams: Streams, state: Tensor) -> tuple[Tensor, Tensor]:
    """Output ``[G, N, Dv]`` and the state after the last token."""
    learned = spec.feature.learned()
    wanted = [x for x in (*streams, state, *learned) if x is not None and x.requires_grad]
    if torch.is_grad_enabled() and wanted:
        return _Run.apply(spec, plan, heads, *streams, state, *learned)  # type: ignore[no-any-return]
    with torch.no_grad():
        return _forward(spec, plan, heads, streams, state, None)


def _forward(
    spec: LinearAttention, plan: Plan, heads: Tensor, streams: Streams, state: Tensor, kept: Tensor | None
) -> tuple[Tensor, Tensor]:
    out = streams.v.new_empty(streams.v.shape)
    after = torch.empty_like(state)
    for rows in plan.groups:
        now = state[rows]
        for number, (time, chunk) in enumerate(plan.stretches):
            if kept is not None:
                kept[number, rows] = now
            out[rows, time], now = advance(spec, plan, heads[rows], streams.cut(rows, time), now, chunk)
        after[rows] = now
    return out, after


class _Run(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, spec: LinearAttention, plan: Plan, heads: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        streams, state, learned = Streams(*tensors[:5]), tensors[5], tensors[6:]
        kept = state.new_empty(len(plan.stretches), *state.shape)
        ctx.spec, ctx.plan, ctx.learned = spec, plan, learned
        ctx.save_for_backward(heads, kept, *streams)
        return _forward(spec, plan, heads, streams, state, kept)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor, d_after: Tensor) -> Any:
        spec, plan, learned = ctx.spec, ctx.plan, ctx.learned
        heads, kept, *tensors = ctx.saved_tensors
        streams = Streams(*tensors)
        asked = ctx.needs_input_grad[3:8]
        grads = [torch.zeros_like(x) if need else None for x, need in zip(tensors, asked, strict=True)]
        d_state = torch.empty_like(kept[0])

        sums = [torch.zeros_like(t) for t in learned]
        for rows in plan.groups:
            now = d_after[rows]
            for number in reversed(range(len(plan.stretches))):
                time, chunk = plan.stretches[number]
                cut = streams.cut(rows, time)
                leaves = [x if x is None else x.detach().requires_grad_(a) for x, a in zip(cut, asked, strict=True)]
                state = kept[number, rows].detach().requires_grad_()
                with torch.enable_grad():
                    results = advance(spec, plan, heads[rows], Streams(*leaves), state, chunk)  # type: ignore[arg-type]
                wanted = [x for x in leaves if x is not None and x.requires_grad]
                found = iter(
                    torch.autograd.grad(
                        results, [*wanted, state, *learned], [d_out[rows, time], now], materialize_grads=True
                    )
                )
                for total in grads:
                    if total is not None:
                        piece(total, rows, time).add_(next(found))
                now = next(found)
                for total in sums:
                    total += next(found)
            d_state[rows] = now
        return None, None, None, *grads, d_state, *sums
