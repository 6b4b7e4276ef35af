"""How far control tokens move what a head of self-attention puts out, and the bound on it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize


def outputs(x: Tensor, u: Tensor, wq: Tensor, wk: Tensor, wv: Tensor) -> Tensor:
    """A head's ``[N, D]`` for queries ``x [N, width]`` over ``[u, x]``, ``u [k, width]``; weights ``[width, D]``."""
    seen = torch.cat([u, x])
    return ((x @ wq) @ (seen @ wk).T / math.sqrt(wq.shape[1])).softmax(-1) @ (seen @ wv)


def orthogonal(x: Tensor, u: Tensor, wq: Tensor, wk: Tensor, wv: Tensor) -> Tensor:
    """How long the part of the outputs is that is orthogonal to those without control ``[N]``."""
    plain = normalize(outputs(x, u[:0], wq, wk, wv), dim=-1)
    found = outputs(x, u, wq, wk, wv)
    return (found - (found * plain).sum(-1, keepdim=True) * plain).norm(dim=-1)


def bound(x: Tensor, control: int, size: float, wq: Tensor, wk: Tensor, wv: Tensor) -> Tensor:
    """What :func:`orthogonal` never exceeds ``[N]``, for so many control tokens no longer than ``size``."""
    root = math.sqrt(wq.shape[1])
    sq, sk, sv = (torch.linalg.matrix_norm(w, 2) for w in (wq, wk, wv))
    log_t = math.log(control) + sq * sk * size * x.norm(dim=-1).max() / root
    log_g = ((x @ wq) @ (x @ wk).T / root).logsumexp(-1)
    return size * sv * (log_t - log_g).sigmoid()  # t / (g + t), where t may be beyond all floats


def tightness(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, control: int, steps: int = 40) -> Tensor:
    """The share of the bound that control tokens reach which are found by gradients ``[N]``."""
    size = float(x.norm(dim=-1).max())
    free = torch.randn(control, x.shape[1], generator=torch.Generator().manual_seed(0)).requires_grad_()
    solver = torch.optim.Adam([free], 0.1)
    for _ in range(steps):
        solver.zero_grad()
        (-orthogonal(x, size * normalize(free, dim=-1), wq, wk, wv).sum()).backward()
        solver.step()
    with torch.no_grad():
        reached = orthogonal(x, size * normalize(free, dim=-1), wq, wk, wv)
        return reached / bound(x, control, size, wq, wk, wv)


@torch.no_grad()
def attention_of(model: Any, tokens: Tensor) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """For each head of a model: what it reads at tokens ``[N]``, ``[N, width]``, and its Wq, Wk, Wv ``[width, D]``."""
    from ...hosts.handles import host_of

    found = []
    for site in host_of(model).sites():
        module: Any = site.module
        inputs: list[Tensor] = []
        hook = module.q_proj.register_forward_pre_hook(lambda m, args, inputs=inputs: inputs.append(args[0][0]))
        model(tokens[None], use_cache=False)
        hook.remove()
        weights = [
            p.weight.unflatten(0, (-1, module.head_dim)).mT for p in (module.q_proj, module.k_proj, module.v_proj)
        ]
        for head in range(site.heads):
            found.append((inputs[0], *(w[head * len(w) // site.heads] for w in weights)))
    return found
