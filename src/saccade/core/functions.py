"""Plain functions of users, written for FlexAttention: over one place, with scalar indices.

Nearly all of them broadcast, and then one call serves a whole tile. Some do not (``torch.dot`` of two looked-up rows,
``intervals[k][0]``), and a few of those would give wrong numbers rather than an error. So the first tile is used to try
a function both ways on a handful of places; one that does not broadcast runs under ``vmap``, as in FlexAttention.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .tile import At

PROBE = (2, 3, 5, 7)  # places tried on each axis; unequal, so that a mixed-up axis shows in the shape


class PlainFunction:
    """A function ``f(*tiles, b, h, q, k)`` that can be called on whole tiles."""

    def __init__(self, function: Callable[..., Any]):
        self.function = function
        self.broadcasts: bool | None = None  # not tried yet

    def __call__(self, at: At, *tiles: Tensor) -> Tensor:
        """Call on the tile at ``at``; the result broadcasts against it."""
        if self.broadcasts is None:
            self.broadcasts = self._try(at, tiles)
        if self.broadcasts:
            return torch.as_tensor(self.function(*tiles, *at.indices), device=at.q.device)
        return place_by_place(self.function, *tiles, *at.indices)

    def _try(self, at: At, tiles: tuple[Tensor, ...]) -> bool:
        with torch.no_grad():
            index = [x[tuple(_some(size, most) for size, most in zip(x.shape, PROBE, strict=True))] for x in at.indices]
            shape = torch.broadcast_shapes(*(x.shape for x in index))
            full = torch.broadcast_shapes(*(x.shape for x in at.indices))
            places = tuple(_some(size, most) for size, most in zip(full, PROBE, strict=True))
            lead = [tile.detach().expand(full)[places] for tile in tiles]
            try:
                want = place_by_place(self.function, *lead, *index)
            except Exception:  # beyond vmap: it must broadcast, or its own error is the one to see
                return True
            try:
                got = torch.as_tensor(self.function(*lead, *index), device=at.q.device).expand(shape)
            except (RuntimeError, IndexError, TypeError, ValueError):
                return False
            return torch.allclose(got.double(), want.expand(shape).double(), rtol=1e-4, atol=1e-6, equal_nan=True)


def _some(size: int, most: int) -> slice:
    """At most so many places, spread over the axis."""
    return slice(None, None, max(1, -(-size // most)))


def place_by_place(function: Callable[..., Any], *tensors: Tensor) -> Tensor:
    """Map a function of scalars over tensors of four dimensions that broadcast."""
    with _ScalarIndices():
        return _lift(function, tensors)


def _lift(function: Callable[..., Any], tensors: tuple[Tensor, ...]) -> Tensor:
    if tensors[0].ndim == 0:
        return torch.as_tensor(function(*tensors))
    inner = [t[0] if t.shape[0] == 1 else t for t in tensors]
    axes = tuple(None if t.shape[0] == 1 else 0 for t in tensors)
    if not any(axis == 0 for axis in axes):
        return _lift(function, tuple(inner))[None]
    return torch.vmap(lambda *items: _lift(function, items), axes)(*inner)


class _ScalarIndices(TorchFunctionMode):
    """Let ``x[i]`` work for a scalar ``i`` under vmap, where Python would ask for its value."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__getitem__:
            x, index = args
            index = index if isinstance(index, tuple) else (index,)
            if any(isinstance(i, Tensor) for i in index) and all(isinstance(i, (Tensor, int)) for i in index):
                # Not .to(device): under vmap an int index is the same for all.
                whole = [i if isinstance(i, Tensor) else torch.tensor(i, device=x.device) for i in index]
                return torch.ops.aten.index(x, whole)
        return func(*args, **(kwargs or {}))
