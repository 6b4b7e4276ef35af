"""Selective self-attention: each query chooses its own temperature, and each value how loudly it speaks.

    temperature(z, n) = tanh(u . gelu(z)) + 1 + exp(-exp(beta)) log n       per head; n counts tokens from 1
    q <- temperature(q, n) q,     v <- temperature'(v, n) v                 then softmax attention as ever

What a token says and how sharply it looks no longer share one vector; log n holds against the dilution of long
contexts. The features z are the queries and values themselves (weight sharing), so that a layer learns two more vectors
per head.

Paper: Selective Attention: Enhancing Transformer through Principled Context Control, arXiv:2411.12892
Code: https://github.com/umich-sota/selective_attention (lit_gpt/gpt_2_PTS.py: the position's part of the queries, with
    beta from 1.5; what depends on the token is not published)

Differs: the token's part, tanh of a small function with shared weights, is after summaries of the paper, and u, its
last layer, is a vector per head here. Keys have no temperature (optional in the paper).
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core import masks
from ...core.attend import weights
from ...core.spec import Attention
from ...nn import GPT, MultiHead
from ...nn.backbones import Place
from ..base import ClaimNumbers, LayerSystem, Promises

BETA = 1.5
NEW = 0.005  # "less than 0.5% new parameters"


class Temperature(nn.Module):
    """A factor for each head and token of ``z [B, H, N, D]``: ``tanh(u . gelu(z)) + 1 + exp(-exp(beta)) log n``."""

    def __init__(self, heads: int, head_width: int):
        super().__init__()
        self.token = nn.Embedding(heads, head_width)
        self.beta = nn.Parameter(torch.tensor(BETA))

    def forward(self, z: Tensor, start: int) -> Tensor:
        """``[B, H, N, 1]``; the first token stands at ``start``."""
        content = (F.gelu(z) * self.token.weight[:, None]).sum(-1, keepdim=True).tanh()
        count = torch.arange(start + 1, start + z.shape[2] + 1, device=z.device, dtype=z.dtype)
        return content + 1 + torch.exp(-torch.exp(self.beta)) * count.log()[:, None]


class Selective(MultiHead):
    """Multi-head attention with temperatures of queries and values."""

    def __init__(self, place: Place):
        spec = Attention(mask=masks.Causal())
        super().__init__(spec, place.width, place.heads, positions=place.positions)
        self.sharpness, self.loudness = (Temperature(place.heads, self.head_width) for _ in "qv")

    def placed(self, x: Tensor, context: Tensor | None = None, start: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values; a factor and the rotation of positions may change places."""
        q, k, v = self.project(x, x if context is None else context)
        q, v = self.sharpness(q, start) * q, self.loudness(v, start) * v
        if self.positions is not None and context is None:
            q, k = self.positions(q, k, start)
        return q, k, v


class SelectiveSelfAttention(LayerSystem):
    """No settings; causal."""

    slug = "selective-self-attention"
    title = "Selective self-attention (SSA)"
    paper = "https://arxiv.org/abs/2411.12892"
    code = "https://github.com/umich-sota/selective_attention"
    promises = Promises(unit_rows=True, hosts=())

    def layer(self, place: Place) -> nn.Module:
        """Multi-head attention with temperatures."""
        return Selective(place)

    def claim(self) -> ClaimNumbers:
        """Small language models of prose and recall, half and half: loss, and how much the rows' entropies differ."""
        from ...study.trainer import Recipe, Task, compete, next_token
        from ...worlds.text import BOS

        models = {"softmax": lambda: GPT(BOS + 1), "selective": lambda: GPT(BOS + 1, attention=self)}
        held = list(islice(_mixed(10_000), 4))
        result = compete(models, Task(_mixed, next_token, lambda: held), Recipe(steps=150))
        excess = result.excess("selective", "softmax")
        new = result.parameters("selective") / result.parameters("softmax") - 1
        spread = {name: [_spread(model, held[0]) for model in trained] for name, trained in result.models.items()}
        mean = {name: statistics.fmean(values) for name, values in spread.items()}
        return ClaimNumbers.decide(
            result.numbers()
            | {f"entropy_spread_{name}": [round(x, 4) for x in values] for name, values in spread.items()}
            | {"excess_loss": round(excess.mean, 4), "excess_error": round(excess.error, 4), "new": round(new, 5)},
            f"With {new:.2%} more parameters the loss on prose and recall differs by {excess.mean:+.4f} nats per byte"
            f" (standard error {excess.error:.4f}) from {result.mean('softmax'):.4f}; the entropies of a head's rows"
            f" differ by {mean['selective']:.3f} (standard deviation) instead of {mean['softmax']:.3f}.",
            lower_loss=excess.below,
            entropies_differ_more=mean["selective"] > mean["softmax"],
            few_parameters=new < NEW,
        )


def _mixed(seed: int) -> Iterator[Tensor]:
    """Endless batches ``[8, 129]``, half of them prose and half key-value recall."""
    from ...worlds.recall import recall
    from ...worlds.text import text

    streams = text(129, seed), recall(129, seed)
    while True:
        yield torch.stack([example.tokens for stream in streams for example in islice(stream, 4)])


@torch.no_grad()
def _spread(model: GPT, tokens: Tensor) -> float:
    """Standard deviation, over the rows of a head, of entropy by log of the keys seen; mean of heads and layers."""
    found = []
    for spec, q, k in model.inside(tokens[:, :-1]):
        w = weights(q, k, spec)[:, :, 1:]
        most = torch.arange(2, w.shape[-1] + 1).log()
        found.append(float((torch.special.entr(w).sum(-1) / most).std(-1).mean()))
    return statistics.fmean(found)
