"""TransNormerLLM: gated linear attention with decay; rotations in its first layer, a norm instead of a denominator.

    q, k, v, u = silu(x Wq), silu(x Wk), x Wv, x Wu
    q, k       = [q cos(t theta), q sin(t theta)], the same of k     LRPE, theta [H, D] learned: first layer only
    S[t]       = exp(log_decay[h]) S[t-1] + k[t] v[t]',   o[t] = q[t]' S[t]
    y          = (u * o / rms(o, heads side by side)) Wo

The rotation gives ``q[t] . k[s]`` the factor ``cos((t - s) theta)`` by coordinate, the decay the factor
``exp(log_decay (t - s))``: together LRPE-d. ``log_decay`` is ALiBi's slope, negative, less from layer to layer; the
last layer sees the whole text. The recurrence multiplies by decays and never divides by them, which is the paper's
robust inference: the other way, ``k[t] exp(-log_decay t)``, overflows.

Paper: Scaling TransNormer to 175 Billion Parameters, arXiv:2307.14995
Code: https://github.com/OpenNLPLab/TransnormerLLM (the model lies with its weights, huggingface.co/OpenNLPLab; the
    same file: https://github.com/weigao266/TNL-MoE, smoe/models/tnl/modeling_transnormer.py: NormLinearAttention)

Differs: the backbone's blocks keep their weighted norms and their perceptron, where the paper's have SimpleRMSNorm and
a gated linear unit without activation. Angles are float32 whatever the stream is (the official code's are the stream's
dtype: in bfloat16 positions above 256 merge). The paper writes the decay as ``8 h / H (1 - l / L)``; here, as in the
code, :func:`._lightning.log_decays`.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.linear import LinearAttention, features, linear_weights
from ...core.masks import Causal
from ...core.spec import Attention
from ...nn import MultiHead
from ...nn.backbones import Place
from ...nn.gates import OutputGate
from ..base import ClaimNumbers, LayerSystem, Promises
from ._lightning import SimpleRMSNorm, log_decays

NEAR = 16  # tokens that count as near, of a context of 128
STEPS, GROWTH, CLOSE = 4096, 2.0, 0.05  # of a decode in bfloat16: its error may grow so much, and be so large


class TransNormerLLM(LayerSystem):
    """No settings."""

    slug = "transnormerllm"
    title = "TransNormerLLM"
    paper = "https://arxiv.org/abs/2307.14995"
    code = "https://github.com/OpenNLPLab/TransnormerLLM"
    promises = Promises(cross=False, exponent=1.0, nonnegative=False, hosts=())

    def layer(self, place: Place) -> nn.Module:
        """Gated linear attention; the backbone's positions are not used."""
        return GatedLinear(place)

    def claim(self) -> ClaimNumbers:
        """Small language models beside softmax and plain linear attention, where they look, and long decoding."""
        from ...study.probes import decoding_errors
        from ...study.trainer import Setup, batches, compare

        setup = Setup(steps=150, seeds=(0, 1))

        def at(layer: int) -> Place:
            return Place(setup.width, setup.heads, layer, setup.layers, None, None)

        result = compare(
            {
                "softmax": lambda setup, layer: Attention(mask=Causal()),
                "plain": lambda setup, layer: LinearAttention(features.Elu1(), normalize=True),
                "ours": lambda setup, layer: self.layer(at(layer)),
            },
            setup,
        )
        tokens = next(batches(setup.validation, setup, 20_000))[:, :-1]
        near = {
            name: statistics.fmean(near_share(model, tokens) for model in result.models[name])
            for name in ("plain", "ours")
        }
        excess = {name: result.excess("ours", name) for name in ("softmax", "plain")}
        early, late = decoding_errors(self.layer(at(0)), setup.width, STEPS)
        return ClaimNumbers.decide(
            result.numbers()
            | {f"near_share_{name}": round(x, 3) for name, x in near.items()}
            | {f"excess_loss_over_{name}": [round(x, 4) for x in gap] for name, gap in excess.items()}
            | {"bfloat16_error_early": round(early, 4), "bfloat16_error_late": round(late, 4)},
            f"Of the weights' absolute mass {near['ours']:.0%} lies on the last {NEAR} tokens (plain linear attention"
            f" {near['plain']:.0%}). {STEPS} steps of decoding in bfloat16 stay within {late:.1%} of float64, from"
            f" {early:.1%} at the start. Validation loss {excess['plain'].mean:+.4f} nats per byte against plain linear"
            f" attention (standard error {excess['plain'].error:.4f}), {excess['softmax'].mean:+.4f} against softmax"
            f" ({excess['softmax'].error:.4f}).",
            no_dilution=near["ours"] > near["plain"],
            stable_decoding=late <= CLOSE and late <= GROWTH * early,
            better_than_softmax=excess["softmax"].mean <= 0,
        )


class LRPE(nn.Module):
    """Linearised relative positions: ``[x cos(t theta), x sin(t theta)]``; theta ``[H, 1, D]`` is learned."""

    def __init__(self, heads: int, head_width: int):
        super().__init__()
        count = heads * head_width
        self.theta = nn.Parameter((10_000 ** (-2 / count * torch.arange(count))).view(heads, 1, head_width))

    def forward(self, q: Tensor, k: Tensor, start: int = 0) -> tuple[Tensor, Tensor]:
        """Queries and keys ``[B, H, N, D]`` whose first token stands at ``start``, as ``[B, H, N, 2 D]``."""
        exact = torch.promote_types(self.theta.dtype, torch.float32)
        time = torch.arange(start, start + q.shape[2], device=q.device, dtype=exact)[:, None]
        angle = time * self.theta.to(exact)
        cos, sin = angle.cos().to(q.dtype), angle.sin().to(q.dtype)
        return torch.cat([q * cos, q * sin], -1), torch.cat([k * cos, k * sin], -1)


class GatedLinear(MultiHead):
    """The layer of this place."""

    def __init__(self, place: Place):
        width, heads = place.width, place.heads
        super().__init__(
            LinearAttention(decay=log_decays(heads, place.index, place.layers)),
            width,
            heads,
            positions=LRPE(heads, width // heads) if place.index == 0 else None,
            gate=OutputGate(nn.Linear(width, width, bias=False), SimpleRMSNorm(), nn.Identity()),
        )

    def project(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """SiLU on queries and keys."""
        q, k, v = super().project(x, context)
        return F.silu(q), F.silu(k), v


@torch.no_grad()
def near_share(model: Any, tokens: Tensor) -> float:
    """Share of the absolute mass of a linear model's weights on the last :data:`NEAR` tokens, over rows that see more,
    heads and layers."""
    x, shares = model.embed(tokens), []
    for block in model.stack.blocks:
        layer = block.attention
        q, k, _ = layer.placed(block.before(x))
        w = linear_weights(q, k, layer.spec).abs()[..., NEAR:, :]
        shares.append(float((w.triu(1) / w.sum(-1, keepdim=True)).sum(-1).mean()))
        x = block(x)
    return statistics.fmean(shares)
