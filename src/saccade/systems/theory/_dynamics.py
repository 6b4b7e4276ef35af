"""A layer of :mod:`.dsf` as the linear system that it is: explicit matrices, and one step after the other."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ...nn.attention import join

if TYPE_CHECKING:
    from .dsf import Dynamical


def matrices(layer: Dynamical, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Lambda's diagonal ``[B, H, N, F Dv]``, B ``[B, H, N, F Dv, width]``, C ``[B, H, N, Dv, F Dv]`` and D.

    Of a layer without positions.
    """
    q, k, v = layer.project(x, x)
    given = layer.options(x)
    if layer.kind == "linear":
        q, k = F.elu(q) + 1, F.elu(k) + 1
    eta = torch.ones_like(v[..., :1])
    if layer.kind == "linear":
        eta = (q * k.cumsum(2)).sum(-1, keepdim=True)
    elif layer.kind == "normalized":
        eta = layer.eta(x)
    a = given["log_decay"].exp()[..., None] if "log_decay" in given else torch.ones_like(eta)
    b = given["beta"][..., None] if "beta" in given else torch.ones_like(eta)
    values = layer.v.weight.unflatten(0, (layer.value_heads, -1))  # [H, Dv, width]
    before = torch.cat([eta[:, :, :1], eta[:, :, :-1]], 2)
    decay = (a * before / eta).expand(*eta.shape[:3], k.shape[-1] * v.shape[-1])
    write = torch.einsum("bhnf,hdw->bhnfdw", k * b / eta, values).flatten(3, 4)
    one = torch.eye(v.shape[-1], dtype=x.dtype)
    read = torch.einsum("bhnf,de->bhndfe", q, one).flatten(4)
    straight = values * (0 if layer.skip is None else layer.skip[:, None, None])
    return decay, write, read, straight


def simulated(layer: Dynamical, x: Tensor) -> Tensor:
    """What the layer gives for ``x [B, N, width]``, by its matrices, one token after the other."""
    decay, write, read, straight = matrices(layer, x)
    h, out = torch.zeros_like(decay[:, :, 0]), []
    for t in range(x.shape[1]):
        h = decay[:, :, t] * h + torch.einsum("bhsw,bw->bhs", write[:, :, t], x[:, t])
        out.append(torch.einsum("bhds,bhs->bhd", read[:, :, t], h) + torch.einsum("hdw,bw->bhd", straight, x[:, t]))
    return layer.out(join(torch.stack(out, 2)))


def products(x: Tensor, order: int) -> Tensor:
    """Features ``[..., F]``: all products of at most so many coordinates, over the root of the factorial."""
    found = [torch.ones_like(x[..., :1])]
    for degree in range(1, order + 1):
        found.append((found[-1][..., None] * x[..., None, :]).flatten(-2) / degree**0.5)
    return torch.cat(found, -1)
