"""Mixture of attention heads: many heads share their keys and values, and each token asks a few of them.

    p     = softmax(x Wg)                                over all ``experts``
    asked = the ``heads`` experts with the greatest p;   w[e] = p[e] / (sum of p over asked, without gradient)
    y     = sum over asked e of  w[e] softmax((x Wq[e]) . k / sqrt(D)) v Wo[e],    k = x Wk, v = x Wv
    loss  = the task's + sum over layers of  0.01 * experts * sum over e of mean(p[e]) * (share of all asks that e gets)
                                           + 0.001 * mean of logsumexp(x Wg)²

An expert is a projection of queries and one of outputs. Only those asked are computed, so more experts cost parameters
and hardly time.

Paper: Mixture of Attention Heads: Selecting Attention Heads Per Token, arXiv:2210.05144
Code: https://github.com/yikangshen/MoA (moa_layer/moa_attention.py, moa_layer/parallel_linear/moe.py; run.sh)

Differs: w is the paper's, with its sum divided by; the released code has that line commented out and weighs by p. The
router starts as the backbone's linear layers do; there from zeros, where all tokens of the first step ask the same
experts. Its noise and sampling of experts, both off in run.sh, are left out, and so is the third loss (cvloss 0). Its
penalties are added to a loss summed over the tokens of a batch, and so weigh next to nothing; here as the paper says.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core import masks
from ...core.errors import SpecError
from ...core.spec import Attention
from ...nn import MultiHead
from ...nn.backbones import Place
from ...nn.gates import best, load_balance
from ..base import ClaimNumbers, LayerSystem, Promises
from ._routed_heads import Loss, contest

BALANCE, ZLOSS = 0.01, 0.001  # switchloss and zloss of run.sh


class Router(nn.Module):
    """Which experts a token asks, and how much it weighs each; in training it keeps its part of the loss."""

    def __init__(self, width: int, experts: int, asked: int):
        super().__init__()
        self.route = nn.Linear(width, experts, bias=False)
        self.asked = asked
        self.penalty: Tensor | None = None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Experts and their weights ``[B, N, asked]`` of ``[B, N, width]``."""
        logits = self.route(x)
        p = F.softmax(logits, -1)
        weight, chosen = p.topk(self.asked, -1)
        if self.training:
            share = load_balance(p, best(p, self.asked)) / self.asked
            self.penalty = BALANCE * share + ZLOSS * logits.logsumexp(-1).square().mean()
        return chosen, weight / weight.sum(-1, keepdim=True).detach()


class MixtureOfHeads(MultiHead):
    """A MultiHead of ``experts`` heads and one head of keys and values, of which each token has a few computed."""

    def __init__(self, spec: nn.Module, place: Place, experts: int):
        head_width = place.width // place.heads
        super().__init__(spec, place.width, experts, kv_heads=1, head_width=head_width, positions=place.positions)
        self.router = Router(place.width, experts, place.heads)

    def project(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of the experts asked ``[B, asked, N, D]``, keys and values ``[B, 1, M, D]``."""
        chosen, _ = self.router(x)
        each = self.q.weight.unflatten(0, (self.heads, -1))
        repeated = x[..., None, :].expand(*chosen.shape, -1)
        return by_expert(repeated, chosen, each).transpose(1, 2), self.k(context)[:, None], self.v(context)[:, None]

    def merge(self, out: Tensor, x: Tensor) -> Tensor:
        """The sum of what they read, each by its own projection."""
        chosen, weight = self.router(x)
        each = self.out.weight.unflatten(1, (self.heads, -1)).transpose(0, 1)
        return (by_expert(out.transpose(1, 2), chosen, each) * weight[..., None]).sum(2)


def by_expert(x: Tensor, chosen: Tensor, each: Tensor) -> Tensor:
    """Rows ``[B, N, asked, width]``, every one by the matrix ``each[its expert]`` ``[experts, out, width]``."""
    expert = chosen.flatten()
    order = expert.argsort()
    parts = x.flatten(0, 2)[order].split(expert.bincount(minlength=len(each)).tolist())
    made = torch.cat([F.linear(part, matrix) for part, matrix in zip(parts, each, strict=True)])
    return made[order.argsort()].unflatten(0, chosen.shape)


class MoAHeads(LayerSystem):
    """Settings: ``experts``; a token asks as many of them as the place has heads; ``causal``."""

    slug = "moa-heads"
    title = "Mixture of attention heads (MoA)"
    paper = "https://arxiv.org/abs/2210.05144"
    code = "https://github.com/yikangshen/MoA"
    promises = Promises(hosts=())

    def __init__(self, experts: int = 16, causal: bool = True):
        self.experts, self.causal = experts, causal

    def layer(self, place: Place) -> nn.Module:
        """A mixture whose active heads are the place's. Raises: SpecError if there are fewer experts."""
        if self.experts < place.heads:
            raise SpecError(f"moa-heads: {place.heads} of {self.experts} experts cannot be asked: give experts=")
        spec = Attention(mask=masks.Causal() if self.causal else masks.Full())
        return MixtureOfHeads(spec, place, self.experts)

    def claim(self) -> ClaimNumbers:
        """Small language models with 4 heads, and with 4 of 16 asked: operations, parameters, loss."""
        from ...study.laws import Work
        from ...study.trainer import Setup, batches

        setup = Setup(steps=100)
        result = contest({"mha": None, "moa": self}, setup, penalized)
        tokens, work = next(batches(setup.validation, setup, 20_000)), {}
        for name in result.models:
            with torch.no_grad(), Work() as counted:
                result.models[name][0](tokens)
            work[name] = counted.count
        excess, cost = result.excess("moa", "mha"), work["moa"] / work["mha"]
        parameters = {name: result.parameters(name) for name in work}
        return ClaimNumbers.decide(
            result.numbers()
            | {
                "excess_loss": round(excess.mean, 4), "excess_error": round(excess.error, 4),
                "operations_ratio": round(cost, 3),
                "parameters_mha": parameters["mha"], "parameters_moa": parameters["moa"],
            },
            f"Asking {setup.heads} of {self.experts} heads takes {cost:.2f} times the operations of {setup.heads} heads"
            f" and has {parameters['moa'] / parameters['mha']:.2f} times the parameters; the validation loss differs by"
            f" {excess.mean:+.4f} nats per byte (standard error {excess.error:.4f}) from {result.mean('mha'):.4f}.",
            no_more_operations=cost <= 1,
            more_capacity=parameters["moa"] > parameters["mha"],
            lower_loss=excess.below,
        )  # fmt: skip


def penalized(plain: Loss) -> Loss:
    """A task's loss, and in training the routers' part of it."""

    def loss(model: nn.Module, batch: Any) -> Tensor:
        found = plain(model, batch)
        routers = [m for m in model.modules() if isinstance(m, Router)]
        penalties = [router.penalty for router in routers if router.training and router.penalty is not None]
        return found + sum(penalties)

    return loss
