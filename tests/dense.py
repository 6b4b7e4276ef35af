"""What the engine is judged by: the dense float64 definition, forward and gradient, on poisoned memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import saccade
from saccade import Attention
from saccade.core import layout


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Every fresh buffer holds NaN: whatever is read before it is written shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextlib.contextmanager
def classified() -> Iterator[None]:
    """Small masks take the way of large ones: by their answer for blocks."""
    before = layout.SMALL
    layout.SMALL = 0
    try:
        yield
    finally:
        layout.SMALL = before


def flat(seen: Any) -> list[Tensor]:
    if isinstance(seen, Tensor):
        return [seen]
    if isinstance(seen, dict):
        seen = seen.values()
    return [x for item in seen for x in flat(item)]


def loss(tensors: Sequence[Tensor], seed: int) -> Tensor:
    """A weighted sum of everything finite, with weights that do not depend on memory layout."""
    draw = torch.Generator().manual_seed(seed)
    total = torch.zeros((), dtype=torch.float64)
    for x in tensors:
        if x.is_floating_point() and x.requires_grad:
            weight = torch.randn(x.shape, generator=draw, dtype=torch.float64)
            total = total + (torch.where(torch.isfinite(x), x, 0).double() * weight).sum()
    return total


def qkv(
    shape: tuple[int, int, int, int, int], width: int = 8, dtype: torch.dtype = torch.float64, seed: int = 0
) -> list[Tensor]:
    """Queries, keys and values for (batch, heads, key heads, N, M)."""
    b, h, hkv, n, m = shape
    draw = torch.Generator().manual_seed(seed)
    sizes = [(b, h, n, width), (b, hkv, m, width), (b, hkv, m, width)]
    return [torch.randn(s, generator=draw, dtype=torch.float64).to(dtype).requires_grad_() for s in sizes]


def everything(
    spec: Attention, inputs: list[Tensor], stats: Sequence[Any], backend: str, offset: int | None = None
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Output, what the stats saw, and the gradients of a loss over all of it."""
    out = saccade.attention(*inputs, spec, stats=stats, backend=backend, offset=offset)
    results = flat(out)
    wanted = [x for x in [*inputs, *spec.learned()] if x.requires_grad]
    return results, list(torch.autograd.grad(loss(results, 7), wanted, allow_unused=True))


def agree(
    spec: Attention, shape: tuple[int, int, int, int, int], stats: Sequence[Any] = (), *, offset: int | None = None,
    tolerance: float = 1e-9, seed: int = 0,
) -> None:  # fmt: skip
    """Assert that the band equals the dense definition in float64: results and every gradient."""
    spec = spec.double()
    inputs = qkv(shape, seed=seed)
    exact, exact_grads = everything(spec, inputs, stats, "reference", offset)
    for way in (contextlib.nullcontext, classified):
        with poisoned(), way():
            ours, grads = everything(spec, inputs, stats, "band", offset)
        for kind, pairs in (("result", zip(exact, ours, strict=True)), ("grad", zip(exact_grads, grads, strict=True))):
            for i, (want, got) in enumerate(pairs):
                assert (want is None) == (got is None), f"{kind} {i}: one side has no gradient"
                if want is not None:
                    torch.testing.assert_close(
                        got, want, rtol=tolerance, atol=tolerance, msg=lambda m, k=kind, i=i: f"{k} {i}: {m}"
                    )
