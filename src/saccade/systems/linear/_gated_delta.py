"""The gated delta rule in chunks, where a chunk's writing may be taken back when it ends."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.linear.forms import decay_of


def gated_delta(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor, written: Tensor, state: Tensor | None, chunk: int
) -> tuple[Tensor, Tensor]:
    """``S[t] = exp(g[t]) S[t-1] + beta[t] k[t] (v[t] - exp(g[t]) S[t-1]' k[t])'``, ``out[t] = S[t]' q[t] / sqrt(D)``.

    q and k are brought to length one; of what a full chunk wrote, the share in ``written`` stays when it ends. In
    chunks as in arXiv:2412.06464, section 3.3.

    Args:
        q, k, v: ``[B, H, n, D]`` and ``[B, H, n, Dv]``, float32 at least.
        beta, g: strength and log-decay, ``[B, H, n]``.
        written: ``[B, H, full chunks]``.
        state: S before the first token, ``[B, H, D, Dv]``; nothing if not given.
        chunk: tokens.

    Returns:
        out ``[B, H, n, Dv]``, and S after the last full chunk.
    """
    batch, n, full = len(q), q.shape[2], written.shape[2]
    rest = (0, 0, 0, -n % chunk)  # tokens that write nothing and forget nothing
    q, k, v = (F.pad(x, rest).flatten(0, 1) for x in (q, k, v))
    q, k = (x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for x in (q, k))
    beta, g = (F.pad(x, rest[2:]).flatten(0, 1) for x in (beta, g))
    decay = decay_of(g, q, chunk)
    q, k, v, beta = (x.unflatten(1, (-1, chunk)) for x in (q, k, v, beta[..., None]))
    known = torch.cat([v * beta, decay.since_start(k * beta)], -1)
    solved = torch.linalg.solve_triangular(decay.scores(k * beta, k, -1), known, upper=False, unitriangular=True)
    own, held = solved.split([v.shape[-1], k.shape[-1]], -1)
    ends, kept = decay.until_end(k).mT, F.pad(written, (0, 1)).flatten(0, 1)[..., None, None]
    now = q.new_zeros(len(q), k.shape[-1], v.shape[-1]) if state is None else state.flatten(0, 1)
    states, writes = [], []
    for block in range(q.shape[1]):
        states.append(now)
        writes.append(own[:, block] - held[:, block] @ now)
        now = decay.carry(now, block) + kept[:, block] * (ends[:, block] @ writes[-1])
    states.append(now)
    out = decay.since_start(q) @ torch.stack(states[:-1], 1) + decay.scores(q, k) @ torch.stack(writes, 1)
    found = (out * q.shape[-1] ** -0.5).flatten(1, 2)[:, :n].unflatten(0, (batch, -1))
    return found, states[full].unflatten(0, (batch, -1))
