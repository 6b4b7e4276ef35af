"""What a stretch of tokens does to a state, and reads from it: in chunks, and token by token.

Both take features ``q, k [G, n, F]``, values ``v [G, n, Dv]``, log-decays (``None``, ``[G]``, ``[G, n]`` or
``[G, n, F]``), writing strengths ``beta [G, n]`` for the delta rule, and the state ``[G, F, Dv]``; both give what is
read ``[G, n, Dv]`` and the state after.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .decay import ChannelDecay, NoDecay, ScalarDecay


def in_chunks(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor | None, state: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    """Quadratic within chunks of so many tokens (n is a multiple), by states from chunk to chunk.

    One chunk as long as the sequence is the parallel form.
    """
    decay = decay_of(log_decay, q, chunk)
    q, k, v = (x.unflatten(1, (-1, chunk)) for x in (q, k, v))
    if beta is None:
        written = decay.until_end(k).mT @ v
        states = decay.across(torch.cat([state[:, None], written], 1))
        before, state = states[:, :-1], states[:, -1]
    else:
        before, state, v = _corrected(k, v, decay, beta.unflatten(1, (-1, chunk)), state)
    out = (decay.since_start(q) @ before).add_(decay.scores(q, k) @ v)
    return out.flatten(1, 2), state


def _corrected(k: Tensor, v: Tensor, decay: NoDecay, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The delta rule: states before each chunk, the state after, and what each token really writes.

    What token t writes depends on what the earlier ones of its chunk wrote: a unit triangular system (the WY form of
    Yang et al., arXiv:2406.06484, section 3.2; with decay arXiv:2412.06464, section 3.3).
    """
    strong = k * beta[..., None]
    known = torch.cat([v * beta[..., None], decay.since_start(strong)], -1)
    system = decay.scores(strong, k, -1).mT  # transposed: LAPACK reads columns
    solved = torch.linalg.solve_triangular(system, known.mT, upper=True, unitriangular=True, left=False).mT
    own, held = solved.split([v.shape[-1], k.shape[-1]], -1)
    ends = decay.until_end(k).mT
    states, writes = [], []
    for chunk in range(k.shape[1]):
        states.append(state)
        writes.append(torch.baddbmm(own[:, chunk], held[:, chunk], state, alpha=-1))
        state = torch.baddbmm(decay.carry(state, chunk), ends[:, chunk], writes[-1])
    return torch.stack(states, 1), state, torch.stack(writes, 1)


def decay_of(log_decay: Tensor | None, like: Tensor, chunk: int) -> NoDecay:
    """The algebra for log-decays of this shape."""
    if log_decay is None:
        return NoDecay()
    if log_decay.ndim == 1:
        return ScalarDecay(log_decay[:, None, None].expand(-1, 1, chunk), like.dtype)
    log_decay = log_decay.unflatten(1, (-1, chunk))
    return ScalarDecay(log_decay, like.dtype) if log_decay.ndim == 3 else ChannelDecay(log_decay.to(like.dtype))


def by_tokens(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor | None, state: Tensor, chunk: int = 1
) -> tuple[Tensor, Tensor]:
    """The recurrence as it is written: time and memory of a step do not depend on how many came before."""
    if log_decay is not None:
        kept = log_decay.to(q.dtype).exp()
        kept = kept[:, None, None] if kept.ndim == 1 else kept[..., None] if kept.ndim == 2 else kept
        kept = kept.expand(-1, q.shape[1], -1)[..., None]  # [G, n, F or 1, 1]
    out = []
    for t in range(q.shape[1]):
        if log_decay is not None:
            state = state * kept[:, t]
        write = v[:, t, None]
        if beta is not None:
            write = (write - k[:, t, None] @ state) * beta[:, t, None, None]
        state = torch.baddbmm(state, k[:, t, :, None], write)
        out.append(q[:, t, None] @ state)
    return torch.cat(out, 1), state
