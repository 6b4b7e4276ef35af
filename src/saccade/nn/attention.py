"""Multi-head attention around a program: projections, positions, grouped heads, a gate, a cache.

    q, k, v = project(x, context)              [B, N, width] -> [B, H, N, D]
    q, k    = positions(q, k, start)
    out     = attend(q, k, v, **options(x))    [B, H, N, Dv], the program's weights times v
    y       = merge(out, x)                    -> [B, N, width]

A system that changes one of these steps derives from :class:`MultiHead` and overrides that one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.attend import attention
from ..core.errors import SpecError, Unsupported
from ..core.linear import LinearAttention, LinearState, linear_attention
from ..core.masks import Padding
from ..core.spec import Attention

PROGRAMS = (Attention, LinearAttention)
"""What :meth:`MultiHead.attend` knows how to run with a cache and padding."""


@dataclass
class KVCache:
    """Keys and values of one layer so far, ``[B, Hkv, M, D]``, positions applied."""

    k: Tensor | None = None
    v: Tensor | None = None

    @property
    def length(self) -> int:
        """Tokens held."""
        return 0 if self.k is None else self.k.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of both."""
        return sum(x.nbytes for x in (self.k, self.v) if x is not None)

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Hold these too; everything that is held."""
        self.k = k if self.k is None else torch.cat([self.k, k], 2)
        self.v = v if self.v is None else torch.cat([self.v, v], 2)
        return self.k, self.v


@dataclass
class StateCache:
    """What linear attention's tokens so far left behind in one layer: as large after a million as after one."""

    state: LinearState | None = None
    length: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the state."""
        return 0 if self.state is None else sum(x.nbytes for x in (self.state.S, self.state.z) if x is not None)


AnyCache = KVCache | StateCache


class MultiHead(nn.Module):
    """Multi-head attention with any program, ``[B, N, width]`` to ``[B, N, width]``.

    Args:
        spec: what is done with queries, keys and values: a :class:`saccade.Attention`, a
            :class:`saccade.LinearAttention`, or any module of (q, k, v).
        width: of the stream.
        heads: query heads.
        kv_heads: key and value heads: one number (1: multi-query, fewer than ``heads``: grouped), or two, of keys and
            of values; as many as query heads if not given.
        head_width: D; ``width / heads`` if not given.
        positions: :class:`~saccade.nn.positions.RoPE` or what acts like it on ``(q, k, start)``; of self-attention.
        gate: a module of ``(out [B, H, N, Dv], x [B, N, width])`` before the heads are merged, see :mod:`.gates`.
        bias: on the projections.

    Raises:
        SpecError: numbers of heads or widths that do not divide.
    """

    def __init__(
        self,
        spec: nn.Module,
        width: int,
        heads: int,
        *,
        kv_heads: int | tuple[int, int] | None = None,
        head_width: int | None = None,
        positions: nn.Module | None = None,
        gate: nn.Module | None = None,
        bias: bool = False,
    ):
        super().__init__()
        if head_width is None:
            if width % heads:
                raise SpecError(f"width {width} is no multiple of {heads} heads: give head_width=")
            head_width = width // heads
        kv_heads = heads if kv_heads is None else kv_heads
        key_heads, value_heads = (kv_heads, kv_heads) if isinstance(kv_heads, int) else kv_heads
        most = max(key_heads, value_heads)
        if heads % most or most % key_heads or most % value_heads:
            raise SpecError(
                f"{heads} query heads, {key_heads} key heads, {value_heads} value heads: each must divide the greater"
            )
        self.heads, self.key_heads, self.value_heads, self.head_width = heads, key_heads, value_heads, head_width
        self.q = nn.Linear(width, heads * head_width, bias=bias)
        self.k = nn.Linear(width, key_heads * head_width, bias=bias)
        self.v = nn.Linear(width, value_heads * head_width, bias=bias)
        self.out = nn.Linear(heads * head_width, width, bias=bias)
        self.positions, self.gate, self.spec = positions, gate, spec

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, cache: AnyCache | None = None, keep: Tensor | None = None
    ) -> Tensor:
        """Attend from ``x [B, N, width]`` to itself, or to ``context [B, M, width]``.

        Args:
            x: the stream; with a cache, the tokens after those it holds.
            context: of cross-attention.
            cache: of :meth:`cache`, what the tokens before left; x's own are added. Not for cross-attention.
            keep: bool ``[B, M]``, which keys are tokens and not padding.
        """
        if cache is not None and context is not None:
            raise SpecError("a cache grows with the stream, a context does not: give cache= or a context, not both")
        start = 0 if cache is None else cache.length
        q, k, v = self.placed(x, context, start)
        given = self.options(x if context is None else context)
        return self.merge(self.attend(q, k, v, cache=cache, keep=keep, **given), x)

    def cache(self) -> AnyCache:
        """An empty cache of the kind that the program needs."""
        return StateCache() if isinstance(self.spec, LinearAttention) else KVCache()

    def placed(self, x: Tensor, context: Tensor | None = None, start: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys (with positions from ``start`` on) and values ``[B, H, N, D]``."""
        q, k, v = self.project(x, x if context is None else context)
        if self.positions is not None and context is None:
            q, k = self.positions(q, k, start)
        return q, k, v

    def project(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of ``x`` and keys and values of ``context``, ``[B, heads, N, D]``."""
        return (
            split(self.q(x), self.heads),
            split(self.k(context), self.key_heads),
            split(self.v(context), self.value_heads),
        )

    def options(self, context: Tensor) -> dict[str, Any]:
        """What else the program is told of each token: ``log_decay``, ``beta``. Nothing, unless overridden."""
        return {}

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, cache: AnyCache | None = None, keep: Tensor | None = None,
        **given: Any,
    ) -> Tensor:  # fmt: skip
        """What the heads read, ``[B, H, N, Dv]``; ``given`` is what :meth:`options` returned."""
        if isinstance(self.spec, LinearAttention) and not isinstance(cache, KVCache):
            if keep is not None:  # a key that is no token writes nothing
                given["beta"] = keep[:, None].to(q.dtype) * given.get("beta", 1.0)
            if cache is None:
                return linear_attention(q, k, v, self.spec, **given)
            out, cache.state = linear_attention(q, k, v, self.spec, state=cache.state, return_state=True, **given)
            cache.length += q.shape[2]
            return out
        if isinstance(self.spec, Attention) and not isinstance(cache, StateCache):
            start = 0 if cache is None else cache.length
            if cache is not None:
                k, v = cache.append(k, v)
            k, v = grouped(k, v)
            return attention(q, k, v, self.spec if keep is None else padded(self.spec, keep), offset=start, **given)
        if cache is not None or keep is not None:
            raise Unsupported(f"{type(self.spec).__name__} takes no {type(cache).__name__} and no padding")
        return self.spec(q, k, v, **given)

    def merge(self, out: Tensor, x: Tensor) -> Tensor:
        """The heads' outputs ``[B, H, N, Dv]`` in the stream ``[B, N, width]``; ``x`` is what the layer was given."""
        return self.out(join(out if self.gate is None else self.gate(out, x)))


def split(x: Tensor, heads: int) -> Tensor:
    """``[B, N, heads * D]`` as ``[B, heads, N, D]``."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def join(x: Tensor) -> Tensor:
    """``[B, heads, N, D]`` as ``[B, N, heads * D]``."""
    return x.transpose(1, 2).flatten(2)


def grouped(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values with equally many heads: the fewer are repeated."""
    heads = max(k.shape[1], v.shape[1])
    k, v = (x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    return k, v


def padded(spec: Attention, keep: Tensor) -> Attention:
    """The program on keys that are tokens, bool ``[B, M]``."""
    score: Sequence[Any] = [spec.form, *spec.modifiers]
    mask = spec.mask & Padding(keep)
    return Attention(score, mask, spec.normalizer, spec.changes, spec.select)
