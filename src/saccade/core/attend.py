"""The three verbs: run a program, see its weights, and ask how it would run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import band, reference
from .border import described
from .errors import SpecError, Unsupported
from .layout import lay_out
from .masks import Causal, Full
from .normalizers import Softmax
from .program import Program
from .selectors import Selection
from .spec import Attention
from .stats import Stat, check_names
from .strips import Shape
from .tile import At

BACKENDS = ("auto", "reference", "band", "sdpa", "flex")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: Attention | None = None,
    *,
    stats: Sequence[Stat] = (),
    backend: str = "auto",
    offset: int | None = None,
    compile: bool = False,
) -> Any:
    """Run an attention program.

    Args:
        q: queries ``[B, H, N, D]``.
        k: keys ``[B, Hkv, M, D]``, H a multiple of Hkv.
        v: values ``[B, Hkv, M, Dv]``.
        spec: the program; plain softmax attention if not given.
        stats: parts of :mod:`saccade.stats` to reduce on the way.
        backend: ``"auto"`` (see :func:`explain` for its rule), ``"reference"``, ``"band"``, ``"sdpa"`` or ``"flex"``.
        offset: place of query 0 among the keys. Not given: the queries are the last N of the M positions
            (``M - N``), and plain functions count queries from 0, as in FlexAttention. Given: all count from it.
        compile: fuse plain score functions with ``torch.compile`` (never needed; the first call compiles).

    Returns:
        ``[B, H, N, Dv]`` in the dtype of q, or, with stats, that and a dict of results by stat name. float16 and
        bfloat16 accumulate in float32. A row that sees no key gives zeros, and zero gradients.

    Raises:
        SpecError: shapes, dtypes, devices or parts that do not fit together.
        Unsupported: the named backend cannot run this program; the message says why.
    """
    spec = Attention() if spec is None else spec
    call = _Call.check(q, k, v, spec, stats, offset)
    program = Program(spec, stats, compile)
    name, _ = choose(call, program, backend)
    if name == "sdpa":
        return _sdpa(call, spec)
    if name == "flex":
        return _flex(call, spec)
    q, k = spec.form.prepare(call.q, call.k)
    k, v = call.unread(spec, k, call.v)
    selection = call.select(spec, q, k)
    if name == "reference":
        out, _, whole = reference.run(program, call.at, selection, q, k, v)
        assert out is not None
        out = out.to(call.q.dtype)
    else:
        dtype = q.dtype
        if dtype == torch.float16 and q.device.type == "cpu":  # no fast float16 product on CPUs
            q, k, v = q.float(), k.float(), v.float()
        out, whole = band.run(program, call.shape, selection, q, k, v)
        out = out.to(dtype)
    return (out, program.finish(whole)) if stats else out


def weights(q: Tensor, k: Tensor, spec: Attention | None = None, *, offset: int | None = None) -> Tensor:
    """The dense weight matrix ``[B, H, N, M]`` that a program denotes: for small N, for tests and pictures.

    The dtype is q's, at least float32. Differentiable. Raises as :func:`attention` does.
    """
    spec = Attention() if spec is None else spec
    call = _Call.check(q, k, None, spec, (), offset)
    q, k = spec.form.prepare(call.q, call.k)
    k, _ = call.unread(spec, k, k)
    return reference.run(Program(spec), call.at, call.select(spec, q, k), q, k, None)[1]


@dataclass(frozen=True)
class Explanation:
    """How a call would run, and why: ``print`` it."""

    backend: str
    why: str
    refused: dict[str, str]
    visited: float
    tiles: int

    def __str__(self) -> str:
        lines = [f"{self.backend}: {self.why}"]
        lines += [f"  not {name}: {reason}" for name, reason in self.refused.items()]
        if self.backend == "band":
            lines.append(f"  {self.tiles} tiles compute {self.visited:.1%} of the score matrix")
        return "\n".join(lines)


def explain(
    spec: Attention | None, q: Tensor, k: Tensor, *, stats: Sequence[Stat] = (), offset: int | None = None,
    backend: str = "auto",
) -> Explanation:  # fmt: skip
    """Say which executor would run a program on such inputs, why not the others, and how much it would compute."""
    spec = Attention() if spec is None else spec
    call = _Call.check(q, k, None, spec, stats, offset)
    program = Program(spec, stats)
    name, why = choose(call, program, backend)
    refused = {other: reason for other in BACKENDS[1:] if (reason := why_not(other, call, program))}
    if name != "band":
        return Explanation(name, why, refused, 1.0, 0)
    layout = lay_out(call.shape, spec.mask, selection=call.select(spec, *spec.form.prepare(call.q, call.k)))
    return Explanation(name, why, refused, layout.visited, len(layout.strips))


def choose(call: _Call, program: Program, backend: str) -> tuple[str, str]:
    """The executor to use, and why. ``auto``: SDPA where the program is plain attention and SDPA wins, else band."""
    if backend not in BACKENDS:
        raise SpecError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}")
    if backend != "auto":
        reason = why_not(backend, call, program)
        if reason:
            raise Unsupported(f"backend {backend!r} cannot run this program: {reason}. backend='auto' can.")
        return backend, "asked for by name"
    reason = why_not("sdpa", call, program)
    if reason is None and call.q.device.type == "cpu" and call.q.dtype == torch.bfloat16 and call.shape.n > 64:
        return "band", "on a CPU the bfloat16 matrix product outruns SDPA's softmax"
    if reason is None:
        return "sdpa", "the program is plain softmax attention"
    reason = why_not("band", call, program)
    if reason is None:
        return "band", "runs any program in tiles, forward and backward"
    return "reference", f"dense, because the band cannot: {reason}"


def why_not(backend: str, call: _Call, program: Program) -> str | None:
    """Why an executor cannot run a program; ``None`` if it can."""
    spec, shape = program.spec, call.shape
    if backend == "band":
        return band.why_not(spec, program.stats)
    if backend == "reference":
        return None
    if program.stats:
        return f"it computes no stats ({', '.join(s.label for s in program.stats)} asked for)"
    if not isinstance(spec.normalizer, Softmax) or spec.normalizer.sink is not None:
        return f"its normalizer is plain softmax, not {type(spec.normalizer).__name__}"
    if len(spec.edits):
        return "it cannot edit weights"
    if spec.select is not None:
        return "it cannot select keys by content"
    if spec.form.scale(call.q.shape[-1]) is None:
        return f"its scores are dot products, not {type(spec.form).__name__}"
    if backend == "flex":
        if call.q.requires_grad and call.q.device.type == "cpu":
            return "FlexAttention has no backward on the CPU"
        if any(not hasattr(s, "function") for s in spec.modifiers) or spec.learned():
            return "only plain score functions are handed over"
        if not isinstance(spec.mask, Full) and not hasattr(spec.mask, "function"):
            return "only a plain mask function is handed over (built-in masks run faster in the band)"
        return None
    if len(spec.scores):
        return f"it cannot modify scores ({', '.join(type(s).__name__ for s in spec.modifiers)})"
    if spec.form.scale(call.q.shape[-1]) == 0:
        return "it gives NaN for a scale of 0"
    if isinstance(spec.mask, Full):
        return None
    if not isinstance(spec.mask, Causal):
        return f"{type(spec.mask).__name__} would need a mask of N x M"
    if shape.offset not in (0, shape.m - 1) or (shape.offset == 0 and shape.n > shape.m):
        return f"its causal mask does not start at position {shape.offset}"
    return None


def _sdpa(call: _Call, spec: Attention) -> Tensor:
    q, k = spec.form.prepare(call.q, call.k)
    shape = call.shape
    causal = isinstance(spec.mask, Causal) and shape.offset != shape.m - 1
    if causal and shape.n < shape.m:
        k, v = k[:, :, : shape.n], call.v[:, :, : shape.n]
    else:
        v = call.v
    scale = spec.form.scale(q.shape[-1])
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=shape.rep > 1)


def _flex(call: _Call, spec: Attention) -> Tensor:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, k = spec.form.prepare(call.q, call.k)
    shape = call.shape

    def score_mod(score: Tensor, *index: Tensor) -> Tensor:
        for modifier in spec.modifiers:
            score = modifier.function(score, *index)  # type: ignore[operator]
        return score

    block_mask = None
    if not isinstance(spec.mask, Full):
        block_mask = create_block_mask(
            spec.mask.function, shape.batch, shape.heads, shape.n, shape.m, device=str(q.device)  # type: ignore[arg-type]
        )  # fmt: skip
    flex = torch.compile(flex_attention)
    out = flex(
        q, k, call.v, score_mod=score_mod if len(spec.scores) else None, block_mask=block_mask,
        scale=spec.form.scale(q.shape[-1]), enable_gqa=shape.rep > 1,
    )  # fmt: skip
    assert isinstance(out, Tensor)
    return out


@dataclass(frozen=True)
class _Call:
    """The checked inputs of one call."""

    q: Tensor
    k: Tensor
    v: Tensor
    shape: Shape

    @staticmethod
    def check(
        q: Tensor, k: Tensor, v: Tensor | None, spec: Attention, stats: Sequence[Stat], offset: int | None
    ) -> _Call:
        if not isinstance(spec, Attention):
            raise SpecError(f"spec must be a saccade.Attention; got {type(spec).__name__}")
        check_names(stats)
        shown = described(q, k, v)
        v = k if v is None else v
        batch = max(x.shape[0] for x in (q, k, v))
        if any(x.shape[0] not in (1, batch) for x in (q, k, v)):
            raise SpecError(f"batch sizes must be equal or 1: {shown}")
        for tensor in [*spec.parameters(), *spec.buffers()] if q.device.type != "cpu" else ():
            if tensor.device != q.device and tensor.ndim:
                raise SpecError(f"the spec holds tensors on {tensor.device}, q is on {q.device}: spec.to({q.device})")
        kv_heads = max(k.shape[1], v.shape[1])
        if any(x.shape[1] not in (1, kv_heads) for x in (k, v)) or q.shape[1] % kv_heads:
            raise SpecError(f"query heads must be a multiple of key heads, and values have as many: {shown}")
        if 0 in q.shape[1:] or 0 in k.shape[1:] or batch == 0:
            raise SpecError(f"no dimension may be empty: {shown}")
        if type(spec.form).__name__ == "Dot" and q.shape[3] != k.shape[3]:
            raise SpecError(f"q and k must have the same width for a dot product: {shown}")
        n, m = q.shape[2], k.shape[2]
        shape = Shape(
            batch, kv_heads, q.shape[1] // kv_heads, n, m, m - n if offset is None else offset, offset is not None,
            q.device,
        )  # fmt: skip
        q = q.expand(batch, *q.shape[1:])
        k, v = (x.expand(batch, kv_heads, *x.shape[2:]) for x in (k, v))
        return _Call(q, k, v, shape)

    @property
    def at(self) -> At:
        s = self.shape
        return At.everywhere(s.batch, s.heads, s.n, s.m, s.offset, s.counted, s.device)

    def unread(self, spec: Attention, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Blank the keys and values that nobody may see: 0 times what lies there might not be 0."""
        unseen = spec.mask.unseen(self.at)
        if unseen is None or (k.device.type == "cpu" and not bool(unseen.any())):
            return k, v
        if unseen.shape[1] > 1:
            unseen = unseen.unflatten(1, (self.shape.kv_heads, self.shape.rep)).all(2)
        gone = unseen[:, :, 0, :, None]
        return k.masked_fill(gone, 0), v.masked_fill(gone, 0)

    def select(self, spec: Attention, q: Tensor, k: Tensor) -> Selection | None:
        """The blocks that the spec's selector chooses."""
        if spec.select is None:
            return None
        s, found = self.shape, spec.select.search(q, k, spec.mask, self.at)
        nq, heads = -(-s.n // found.rows), found.blocks.shape[1]
        if found.blocks.ndim != 4 or found.blocks.shape[2] != nq or heads not in (1, s.kv_heads, s.heads):
            raise SpecError(
                f"{type(spec.select).__name__} returned blocks {tuple(found.blocks.shape)}; expected"
                f" [{s.batch}, 1 or {s.kv_heads} or {s.heads}, {nq}, s]"
            )
        return found
