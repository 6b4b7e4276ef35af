"""The two verbs of kernelised attention: run a program, and see the weights that it means."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..border import described
from ..errors import SpecError
from . import parallel
from .forms import by_tokens
from .run import Plan, Streams, advance, divided, mapped, run, wide
from .spec import LinearAttention, LinearState

FORMS = ("auto", "parallel", "chunked", "recurrent")

Documents = Tensor | tuple[Tensor, Tensor]


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: LinearAttention | None = None,
    *,
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
    state: LinearState | None = None,
    documents: Documents | None = None,
    form: str = "auto",
    return_state: bool = False,
) -> Any:
    """Run kernelised attention.

    Args:
        q: queries ``[B, H, N, D]``. Heads of every input may be grouped: their number divides the greatest, H.
        k: keys ``[B, Hkv, M, D]``; M = N if causal.
        v: values ``[B, Hkv, M, Dv]``.
        spec: the program; ``LinearAttention()``, unnormalised and without decay, if not given.
        log_decay: log-decays <= 0 (``-inf`` forgets everything): ``[H]``, ``[B, H, N]``, or ``[B, H, N, F]`` by
            channel of the features.
        beta: ``[B, H, M]``, the writing strength of the delta rule (1 if not given); without it a factor on the keys.
        state: what earlier calls left behind.
        documents: packed sequences, whose state begins anew: ids ``[N]`` or ``[B, N]``, each document one run, or
            ``cu_seqlens`` (1-D, from 0 to N). If not causal, also a pair of ids, of queries and of keys.
            A given state belongs to the first document.
        form: ``"chunked"``; ``"recurrent"``; ``"parallel"`` (N x N); ``"auto"``: recurrent for one token, else chunked.
        return_state: return ``(out, state)``, the state after the last token.

    Returns:
        ``[B, H, N, Dv]`` in the dtype of q. float16 and bfloat16 accumulate in float32, as the state does.

    Raises:
        SpecError: shapes, dtypes or parts that do not fit together.
    """
    spec = LinearAttention() if spec is None else spec
    if form not in FORMS:
        raise SpecError(f"form must be one of {', '.join(FORMS)}; got {form!r}")
    call = _Call.check(q, k, v, spec, log_decay, beta, state, documents)
    if form == "auto":
        form = "recurrent" if q.shape[2] == 1 else "chunked"
    if not spec.causal:
        if documents is None:
            out, after = _whole(call, form, call.streams)
        elif state is None and not return_state:
            out, after = _whole_documents(call, form), call.state
        else:
            raise SpecError("without causal order every document has a state of its own: none is taken or given")
    else:
        plan = Plan.of(form, spec, call.streams)
        if q.shape[2] == 1:
            out, after = advance(spec, plan, call.heads, call.streams, call.state, 1)
        else:
            out, after = run(spec, plan, call.heads, call.streams, call.state)
    out = out.to(q.dtype).unflatten(0, (call.batch, -1))
    return (out, call.unfold(after)) if return_state else out


def linear_weights(
    q: Tensor,
    k: Tensor,
    spec: LinearAttention | None = None,
    *,
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
    documents: Documents | None = None,
) -> Tensor:
    """The dense weights ``[B, H, N, M]`` that a program denotes, so that ``out = weights @ v``: for small N.

    At least float32. Differentiable. Arguments and errors as for :func:`linear_attention`.
    """
    spec = LinearAttention() if spec is None else spec
    call = _Call.check(q, k, None, spec, log_decay, beta, None, documents)
    visible = None
    if not spec.causal and call.documents is not None:
        rows, keys = call.documents
        visible = (rows[:, :, None] == keys[:, None, :]).repeat_interleave(len(call.heads) // call.batch, 0)
    q, k, _ = mapped(spec, call.heads, call.streams.q, call.streams.k, call.streams.v)
    return parallel.weights(spec, q, k, call.streams.log_decay, call.streams.beta, visible).unflatten(
        0, (call.batch, -1)
    )


def _whole(call: _Call, form: str, streams: Streams) -> tuple[Tensor, Tensor]:
    """Not causal: every query reads what all keys wrote."""
    spec, state = call.spec, call.state
    q, k, v = mapped(spec, call.heads, streams.q, streams.k, streams.v)
    if streams.beta is not None:
        k = k * streams.beta.to(k.dtype)[..., None]
    after = by_tokens(k, k, v, None, None, state)[1] if form == "recurrent" else torch.baddbmm(state, k.mT, v)
    out = q @ state + (q @ k.mT) @ v if form == "parallel" else q @ after
    return divided(spec, out), after


def _whole_documents(call: _Call, form: str) -> Tensor:
    """The same for each document."""
    assert call.documents is not None
    streams = call.streams
    out = streams.v.new_zeros(streams.q.shape[0], streams.q.shape[1], streams.v.shape[2])
    per = len(call.heads) // call.batch
    for b, (rows, keys) in enumerate(zip(*call.documents, strict=True)):
        g = slice(b * per, (b + 1) * per)
        part = call.of(g)
        for name in keys.unique().tolist():
            i, j = (rows == name).nonzero()[:, 0], (keys == name).nonzero()[:, 0]
            if len(i):
                beta = None if streams.beta is None else streams.beta[g, j]
                out[g, i] = _whole(part, form, Streams(streams.q[g, i], streams.k[g, j], streams.v[g, j], None, beta))[
                    0
                ].to(out.dtype)
    return out


@dataclass(frozen=True)
class _Call:
    """The checked inputs of one call, batch and heads flattened."""

    spec: LinearAttention
    batch: int
    heads: Tensor
    streams: Streams
    state: Tensor
    documents: tuple[Tensor, Tensor] | None

    @staticmethod
    def check(
        q: Tensor, k: Tensor, v: Tensor | None, spec: LinearAttention, log_decay: Tensor | None, beta: Tensor | None,
        state: LinearState | None, documents: Documents | None,
    ) -> _Call:  # fmt: skip
        if not isinstance(spec, LinearAttention):
            raise SpecError(f"spec must be a saccade.LinearAttention; got {type(spec).__name__}")
        shown = described(q, k, v)
        v = k if v is None else v
        n, m = q.shape[2], k.shape[2]
        if spec.causal and n != m:
            raise SpecError(
                f"a causal call sees queries and keys of the same tokens: {shown}. Earlier ones come as state=;"
                " for another sequence's keys use causal=False."
            )
        if n == 0 or (m == 0 and state is None):
            raise SpecError(f"no dimension may be empty (keys may, if a state is given): {shown}")
        if spec.decay is not None:
            if log_decay is not None:
                raise SpecError("the spec has a constant decay; give log_decay with the call or decay in the spec")
            log_decay = spec.decay.log.reshape(-1)
        if log_decay is not None:
            if not spec.causal:
                raise SpecError("a decay needs an order of tokens: causal=True")
            if log_decay.ndim not in (1, 3, 4) or (log_decay.ndim > 1 and log_decay.shape[2] != n):
                raise SpecError(f"log_decay must be [H], [B, H, {n}] or [B, H, {n}, F]; got {tuple(log_decay.shape)}")
            if (greatest := float(log_decay.detach().max())) > 0:
                raise SpecError(f"log_decay must be <= 0 (a decay of at most 1); its greatest is {greatest:.3g}")
        if beta is not None and (beta.ndim != 3 or beta.shape[2] != m):
            raise SpecError(f"beta must be [B, H, {m}]; got {tuple(beta.shape)}")

        timed = [x for x in (q, k, v, log_decay, beta) if x is not None and x.ndim > 1]
        counts = [x.shape[1] for x in timed] + ([] if log_decay is None or log_decay.ndim > 1 else [len(log_decay)])
        batch, heads = max(x.shape[0] for x in timed), max(counts)
        if state is not None:
            batch = max(batch, state.S.shape[0])
        if any(x.shape[0] not in (1, batch) for x in timed) or any(heads % count for count in counts):
            raise SpecError(
                "batch sizes must be equal or 1, and numbers of heads divide the greatest:"
                f" {', '.join(str(tuple(x.shape)) for x in timed)}"
            )

        def flat(x: Tensor) -> Tensor:
            x = x.repeat_interleave(heads // x.shape[1], 1) if x.shape[1] < heads else x
            return x.expand(batch, *x.shape[1:]).flatten(0, 1)

        if spec.delta and beta is None:
            beta = q.new_ones(1, 1, n)
        if log_decay is not None and log_decay.ndim == 1:
            log_decay = log_decay.repeat_interleave(heads // len(log_decay)).repeat(batch)
        elif log_decay is not None:
            log_decay = flat(log_decay)
        index = torch.arange(heads, device=q.device).repeat(batch)
        streams = Streams(flat(q), flat(k), flat(v), log_decay, None if beta is None else flat(beta))
        ids = None if documents is None else _documents(documents, batch, n, m, spec.causal)
        if ids is not None and spec.causal:
            streams = streams._replace(log_decay=_forget(log_decay, ids[0], heads, streams.q))
        return _Call(spec, batch, index, streams, _state(spec, state, index, streams, batch), ids)

    def unfold(self, state: Tensor) -> LinearState:
        """A flat state as the caller sees it."""
        state = state.unflatten(0, (self.batch, -1))
        if not self.spec.normalize:
            return LinearState(state)
        return LinearState(state[..., :-1], state[..., -1])

    def of(self, rows: slice) -> _Call:
        """Some of the heads alone, their streams left to the caller."""
        return _Call(self.spec, 1, self.heads[rows], self.streams, self.state[rows], None)


def _state(spec: LinearAttention, given: LinearState | None, heads: Tensor, streams: Streams, batch: int) -> Tensor:
    """The state as one tensor ``[G, F, Dv]``, sums of features as its last column."""
    kind = wide(streams.q.dtype)
    with torch.no_grad():
        q = spec.feature.query(streams.q[:1, :1].to(kind), heads[:1])
        like = streams.k if streams.k.shape[1] else streams.q
        k = spec.feature.key(like[:1, :1].to(kind), heads[:1])
    if q.shape[-1] != k.shape[-1]:
        raise SpecError(f"queries have {q.shape[-1]} features and keys {k.shape[-1]}: their product needs as many")
    width, log_decay = k.shape[-1], streams.log_decay
    if log_decay is not None and log_decay.ndim == 3 and log_decay.shape[2] != width:
        raise SpecError(f"log_decay by channel must have one value per feature, {width}; got {log_decay.shape[2]}")
    shape = (len(heads), width, streams.v.shape[2])
    if given is None:
        return q.new_zeros(*shape[:2], shape[2] + spec.normalize)
    wanted = (batch, len(heads) // batch, *shape[1:])
    if given.S.shape != wanted or (spec.normalize and (given.z is None or given.z.shape != wanted[:3])):
        got = f"S {tuple(given.S.shape)}, z {None if given.z is None else tuple(given.z.shape)}"
        raise SpecError(f"state must be S {wanted}{f', z {wanted[:3]}' if spec.normalize else ''}; got {got}")
    whole = torch.cat([given.S, given.z[..., None]], -1) if spec.normalize and given.z is not None else given.S
    return whole.to(kind).flatten(0, 1)


def _documents(given: Documents, batch: int, n: int, m: int, causal: bool) -> tuple[Tensor, Tensor]:
    """Documents of the queries ``[B, N]`` and of the keys ``[B, M]``."""
    both: Sequence[Tensor] = given if isinstance(given, tuple) else (given, given)
    if isinstance(given, tuple) and causal:
        raise SpecError("documents: a causal call takes one tensor, its queries and keys are the same tokens")
    if len(both) != 2 or (not isinstance(given, tuple) and n != m):
        raise SpecError(f"documents: {n} queries and {m} keys need a pair (ids of queries, ids of keys)")
    found = []
    for ids, size in zip(both, (n, m), strict=True):
        bounds = ids.ndim == 1 and len(ids) > 1 and ids[0] == 0 and ids[-1] == size and bool((ids.diff() >= 0).all())
        if bounds and len(ids) == size:
            raise SpecError(f"documents: {size} numbers from 0 to {size} may be ids or bounds; give ids as [1, {size}]")
        if bounds:
            ids = torch.repeat_interleave(torch.arange(len(ids) - 1, device=ids.device), ids.diff())
        if ids.ndim not in (1, 2) or ids.shape[-1] != size or (ids.ndim == 2 and len(ids) not in (1, batch)):
            raise SpecError(
                f"documents must be ids [{size}] or [B, {size}], or bounds from 0 to {size}; got {tuple(ids.shape)}"
            )
        found.append(ids.expand(batch, size))
    return found[0], found[1]


def _forget(log_decay: Tensor | None, ids: Tensor, heads: int, like: Tensor) -> Tensor:
    """Log-decays that let nothing pass from one document into the next."""
    begins = torch.zeros_like(ids, dtype=torch.bool)
    begins[:, 1:] = ids[:, 1:] != ids[:, :-1]
    begins = begins.repeat_interleave(heads, 0)
    if log_decay is None:
        log_decay = like.new_zeros(1, dtype=wide(like.dtype))
    if log_decay.ndim == 1:
        log_decay = log_decay[:, None].expand(begins.shape)
    return log_decay.masked_fill(begins if log_decay.ndim == 2 else begins[..., None], -torch.inf)
