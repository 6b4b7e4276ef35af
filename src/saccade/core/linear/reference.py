"""The independent definition: float64, one head and one token after the other, as the papers write it.

It shares nothing with the forms but the feature maps (which have tests of their own). Slow; differentiable.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .spec import LinearAttention, LinearState


def step_by_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: LinearAttention,
    *,
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
    state: LinearState | None = None,
    documents: Tensor | tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, LinearState]:
    """Output and last state, float64, of the recurrence in :class:`saccade.LinearAttention`.

    Arguments as for :func:`saccade.linear_attention`; documents as ids ``[B, N]``.
    """
    batch, heads = q.shape[0], max(x.shape[1] for x in (q, k, v))
    log_decay = spec.decay.log if spec.decay is not None else log_decay
    outs, states, sums = [], [], []
    for b in range(batch):
        for h in range(heads):

            def own(x: Tensor, b: int = b, h: int = h) -> Tensor:
                return x[b, h * x.shape[1] // heads].double()

            head = torch.tensor([h])
            f_q = spec.feature.query(own(q)[None], head)[0] * spec.scale
            f_k = spec.feature.key(own(k)[None], head)[0]
            values, strength = own(v), None if beta is None else own(beta)
            empty = values.new_zeros(f_k.shape[1], values.shape[1])
            memory = empty if state is None else state.S[b, h].double()
            z = f_k.new_zeros(f_k.shape[1]) if state is None or state.z is None else state.z[b, h].double()
            rows = []
            if spec.causal:
                for t in range(len(f_k)):
                    if isinstance(documents, Tensor) and t and documents[b, t] != documents[b, t - 1]:
                        memory, z = torch.zeros_like(memory), torch.zeros_like(z)
                    if log_decay is not None:
                        g = log_decay.double().reshape(-1) if log_decay.ndim < 3 else own(log_decay)[t]
                        g = g[h * len(g) // heads] if log_decay.ndim < 3 else g
                        memory = (torch.exp(g)[:, None] if g.ndim else torch.exp(g)) * memory
                        z = torch.exp(g) * z
                    memory, z = _write(
                        memory, z, f_k[t], values[t], 1.0 if strength is None else strength[t], spec.delta
                    )
                    rows.append(_read(memory, z, f_q[t], spec))
            else:
                for t in range(len(f_q)):
                    memory_t, z_t = memory, z
                    for s in range(len(f_k)):
                        if documents is None or _ids(documents, 0)[b, t] == _ids(documents, 1)[b, s]:
                            memory_t, z_t = _write(
                                memory_t, z_t, f_k[s], values[s], 1.0 if strength is None else strength[s], False
                            )
                    rows.append(_read(memory_t, z_t, f_q[t], spec))
                memory, z = memory_t, z_t
            outs.append(torch.stack(rows))
            states.append(memory)
            sums.append(z)
    memory, z = (torch.stack(x).unflatten(0, (batch, heads)) for x in (states, sums))
    return torch.stack(outs).unflatten(0, (batch, heads)), LinearState(memory, z if spec.normalize else None)


def _write(memory: Tensor, z: Tensor, k: Tensor, v: Tensor, beta: Tensor | float, delta: bool) -> tuple[Tensor, Tensor]:
    stored = memory.T @ k if delta else 0
    return memory + beta * torch.outer(k, v - stored), z + beta * k


def _read(memory: Tensor, z: Tensor, q: Tensor, spec: LinearAttention) -> Tensor:
    out = memory.T @ q
    return out / (q @ z + spec.eps) if spec.normalize else out


def _ids(documents: Tensor | tuple[Tensor, Tensor], side: int) -> Tensor:
    return documents[side] if isinstance(documents, tuple) else documents
