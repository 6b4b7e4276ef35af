"""Gates between the heads and the output projection: ``f(out [B, H, N, D], x [B, N, width]) -> [B, H, N, D]``.

OutputGate  every coordinate by a function of the token (TransNormerLLM, Lightning, Mega, ReLA)
HeadRouter  every head by a router that lets each token choose some of them (MoH, MoA)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.errors import SpecError
from .attention import join, split


class OutputGate(nn.Module):
    """``norm(out) * activation(gate(x))``, the heads side by side.

    Args:
        gate: a module from ``[B, N, width]`` to ``[B, N, H * D]``.
        norm: of ``[B, N, H * D]``; none if not given.
        activation: sigmoid if not given.
    """

    def __init__(
        self, gate: nn.Module, norm: nn.Module | None = None, activation: Callable[[Tensor], Tensor] = torch.sigmoid
    ):
        super().__init__()
        self.gate, self.norm, self.activation = gate, norm, activation

    def forward(self, out: Tensor, x: Tensor) -> Tensor:
        """The gated heads."""
        whole = join(out) if self.norm is None else self.norm(join(out))
        return split(whole * self.activation(self.gate(x)), out.shape[1])


class HeadRouter(nn.Module):
    """Mixture-of-Head's gates (arXiv:2410.11842): some heads always, of the others the best few for each token.

        p = softmax(x Wr);   routed gate = keep * p / (sum of the kept p), 0 for those that are not kept
        shared gate = shared * softmax(x Ws);   both stages weighed by 2 * softmax(x Wh)

    As in the official code (MoH-ViT/attention.py), whose factors make the gates one on average. After a call in
    training, ``balance`` is its load-balancing loss, see :func:`load_balance`.

    Args:
        width: of the stream.
        heads: of the layer; the first ``shared`` of them are always on.
        keep: how many of the others a token uses.
        shared: may be 0.
    """

    def __init__(self, width: int, heads: int, keep: int, shared: int = 0):
        super().__init__()
        routed = heads - shared
        if shared < 0 or not 1 <= keep <= routed:
            raise SpecError(f"HeadRouter: of {heads} heads {shared} are shared; keep={keep} must lie in 1..{routed}")
        self.keep, self.shared, self.routed = keep, shared, routed
        self.route = nn.Linear(width, routed, bias=False)
        self.share = nn.Linear(width, shared, bias=False) if shared > 1 else None
        self.stages = nn.Linear(width, 2, bias=False) if shared else None
        self.balance: Tensor | None = None

    def forward(self, out: Tensor, x: Tensor) -> Tensor:
        """Every head times its gate."""
        return out * self.gates(x).mT[..., None]

    def gates(self, x: Tensor) -> Tensor:
        """One factor per token and head ``[B, N, H]``."""
        p = F.softmax(self.route(x), -1)
        kept = best(p, self.keep)
        self.balance = load_balance(p, kept) if self.training else None
        routed = p * kept
        routed = self.keep * routed / routed.sum(-1, keepdim=True).clamp(min=torch.finfo(p.dtype).eps)
        if self.stages is None:
            return routed
        stage = 2 * F.softmax(self.stages(x), -1)
        shared = torch.ones_like(x[..., :1]) if self.share is None else self.shared * F.softmax(self.share(x), -1)
        return torch.cat([stage[..., :1] * shared, stage[..., 1:] * routed], -1)


def best(p: Tensor, keep: int) -> Tensor:
    """1 for the ``keep`` greatest of each row ``[..., E]``, 0 for the others."""
    return torch.zeros_like(p).scatter(-1, p.topk(keep, -1).indices, 1.0)


def load_balance(p: Tensor, kept: Tensor) -> Tensor:
    """``E * sum over e of mean(p[e]) * mean(kept[e])`` over the tokens of ``[..., E]``."""
    p, kept = p.flatten(0, -2), kept.flatten(0, -2)
    return p.shape[-1] * (p.mean(0) * kept.mean(0)).sum()


def balance(model: nn.Module) -> Tensor:
    """Mean over the layers of the load-balancing losses of the last call, as the official MoH-ViT/engine.py has it.

    0 where nothing is routed, or not in training. A layer's is a tensor called ``balance`` in any of its modules.
    """
    losses = (getattr(m, "balance", None) for m in model.modules())
    found = [loss for loss in losses if isinstance(loss, Tensor)]
    return torch.stack(found).mean() if found else torch.zeros(())
