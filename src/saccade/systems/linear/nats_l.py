"""NAtS-L: each block of tokens is remembered by softmax attention or by a gated delta rule, as the layer chooses.

    p        = softmax(Wc mean of the block's x),  chosen = argmax p         per block and head: softmax or linear
    q, k, v  = silu(conv(x W)), shared by both; the linear heads are wide, each is ``split`` softmax heads
    soft[i]  = softmax over j <= i of norm(q[i]) . norm(k[j]) / sqrt(d), j in i's block or in one chosen for softmax
    S        = gated delta rule (decay exp(g), strength beta) of normalized q, k; where a block ends that was chosen for
               softmax, S becomes what it was before the block, decayed as long
    y        = (norm(S' q) * s0 + norm(soft) * s1) * silu(x Wg) Wo,          s = softmax(q Ws) per softmax head

The choice is learned from the loss alone: p gets the gradient of a factor on ``exp(score)`` of later blocks' queries,
and of one on what the block leaves in S, each where it was chosen (straight through). The layer is in _token_hybrid.

Paper: Neural Attention Search Linear: Towards Adaptive Token-Level Hybrid Attention Models, arXiv:2602.03681
Code: https://github.com/automl/NeuralAttentionSearchLinear (src/nats/layers/natsl_attn_gdn.py, ops/mixed_ops/
    mixed_attn_gdn.py; settings of experiments/configs/natsl_340M.json)

Differs: blocks have 16 tokens unless told (official: 64, its kernel's). The official models put this layer in every
fourth place and gated DeltaNet in the others; here the backbone decides. A decoding step computes its block anew, and
the cache drops a block that no head of any sequence keeps for softmax (the official one drops it head by head).
"""

from __future__ import annotations

import statistics
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from ...nn.backbones import Place
from ..base import ClaimNumbers, LayerSystem, Promises
from ._token_hybrid import TokenHybrid

MIXED = 0.05  # "mixed": both kinds are chosen for at least this share of the blocks
SYMBOLS, WIDTH, HEADS, BLOCK = 16, 64, 4, 8  # of the claim: a state has keys of 12, and there are 16 to be recalled


class NatsL(LayerSystem):
    """Settings: ``block``, tokens that are chosen for together; ``split``, softmax heads of a linear head."""

    slug = "nats-l"
    title = "NAtS-L (token-level hybrid attention)"
    paper = "https://arxiv.org/abs/2602.03681"
    code = "https://github.com/automl/NeuralAttentionSearchLinear"
    promises = Promises(cross=False, nonnegative=False, hosts=())

    def __init__(self, block: int = 16, split: int = 2):
        self.block, self.split = block, split

    def layer(self, place: Place) -> nn.Module:
        """The layer; positions of the backbone are not used (as in the official models)."""
        return TokenHybrid(place, self.block, self.split)

    def claim(self) -> ClaimNumbers:
        """What is recalled beside linear attention alone, whose state is too small for it; and what is chosen."""
        from ...study.trainer import Recipe, Task, accuracy, compete, labelled
        from ...worlds.rotation import rotation

        world, kinds = partial(rotation, SYMBOLS), {"linear": _LinearAlone, "nats-l": TokenHybrid}
        result = compete(
            {name: partial(_reader, kind) for name, kind in kinds.items()},
            Task(world, labelled, lambda: islice(world(10_000), 8), accuracy, "accuracy"),
            Recipe(steps=400, lr=2e-2, seeds=(0, 1)),
        )
        gain = result.excess("nats-l", "linear")
        shares = [soft_share(model, next(world(20_000))[0]) for model in result.models["nats-l"]]
        share = statistics.fmean(shares)
        return ClaimNumbers.decide(
            result.numbers()
            | {"softmax_share": [round(x, 4) for x in shares], "excess": round(gain.mean, 4)}
            | {"excess_error": round(gain.error, 4)},
            f"Of {SYMBOLS} symbols in a row, said again from another one on, it tells {result.mean('nats-l'):.1%} of"
            f" those that follow (linear attention alone {result.mean('linear'):.1%}), with {share:.0%} of the blocks"
            " remembered by softmax attention.",
            recall_above_linear=gain.above,
            mixed=MIXED <= share <= 1 - MIXED,
        )


class _LinearAlone(TokenHybrid):
    """All blocks are chosen for the state; softmax attention sees its own block."""

    def choices(self, stream: Tensor) -> Tensor:
        return torch.zeros_like(super().choices(stream)) + torch.tensor([0, 1], device=stream.device)


def _reader(kind: type[TokenHybrid]) -> nn.Module:
    from ...nn import GPT

    place = Place(WIDTH, HEADS, 0, 1, None, None)
    return GPT(SYMBOLS, WIDTH, 1, HEADS, attention=lambda layer, heads: kind(place, BLOCK, split=2))


@torch.no_grad()
def soft_share(model: Any, tokens: Tensor) -> float:
    """Share of the full blocks, over sequences, layers and heads, that are chosen for softmax attention."""
    x, found = model.embed(tokens), []
    for block in model.stack.blocks:
        found.append(float(block.attention.choices(block.before(x))[..., 0].mean()))
        x = block(x)
    return statistics.fmean(found)
