"""SeerAttention: a small gate per head, distilled from the model's own attention, predicts which blocks matter.

    Q[i]     = mean of q over block i                         q and k without RoPE
    K[j]     = [max, min, mean of k over block j] weight[h]   3 D to D, one matrix per query head
    gate     = softmax over visible j of RoPE(Q[i], first row of i) . RoPE(K[j], first key of j) / sqrt(D)
    blocks   = the (1 - sqrt(1 - ratio)) * blocks best of each row, or all with gate > threshold; the last rows all
    teacher  = largest weight of each block, divided by the sum of its row of blocks;  loss = KL(teacher, gate)

Paper: SeerAttention: Learning Intrinsic Sparse Attention in Your LLMs, arXiv:2410.13276
Code: https://github.com/microsoft/SeerAttention (seer_attn/prefill_sparse/attn_gate.py, Qavg_Kmaxminavg;
    seer_attn/modules/common.py; seer_attn/kernels/attn_pooling_kernel_2d.py; scripts/run_distillation_prefill.sh)

Differs: the gate gets queries and keys that have RoPE and turns them back, so it must know the model's base ``theta``
(plain RoPE; ``None``: there is none), and takes the queries for the last positions. It is as wide as a head, the
official default; other widths, which need a second matrix, are not offered. Distillation stores pooled queries and keys
of whole texts and trains on them (official: the model runs at every step). As in the official code the own block is not
forced, queries of a block choose together, later ones among them, and decoding is dense: one query is a last row
(unless ``last`` is 0). A gate of no width has no matrix: it compares means, and is what learning must beat.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ...core.attend import attention
from ...core.errors import SpecError
from ...core.masks import EMPTY, Causal
from ...core.selectors import Selection
from ...core.spec import Attention
from ..base import ClaimNumbers, Promises, System
from ._block_gate import BlockGate
from ._vertical_slash import largest, listed

NEAR = 1.05  # perplexity may be this many times the dense one
FASTER = 3.0  # "several times" as fast as dense
UNSEEN = -1e9


class Gate(BlockGate):
    """The gates of a layer and what they choose; arguments as in the system, ``width`` for a gate with a matrix."""

    def __init__(
        self, heads: int, width: int | None = None, block: int = 64, ratio: float = 0.1,
        threshold: float | None = None, theta: float | None = 10_000.0, last: int = 2,
    ):  # fmt: skip
        super().__init__(heads, width, block, theta)
        if not 0 < ratio <= 1 or last < 0:
            raise SpecError(f"Gate needs 0 < ratio <= 1 and last >= 0; got {ratio} and {last}")
        self.ratio, self.threshold, self.last = ratio, threshold, last

    def choose(self, q: Tensor, k: Tensor, codes: Tensor) -> Selection:
        with torch.no_grad():
            visible = codes > EMPTY
            gate = self.logits(*self.pooled(q, k), k.shape[2] - q.shape[2]).float().masked_fill(~visible, UNSEEN)
            if self.threshold is not None:
                chosen = gate.softmax(-1) > self.threshold
            else:
                keep = max(1, int((1 - math.sqrt(1 - self.ratio)) * gate.shape[-1]))
                chosen = largest(gate, keep)
            if self.last:
                chosen[:, :, -self.last :] = True
            return listed(chosen & visible, self.rows, self.columns)


class SeerAttention(System):
    """Settings: ``width`` of the heads (``None``: gates without matrices), keys per ``block``, ``ratio`` or else
    ``threshold``, the model's RoPE base ``theta``, and how many ``last`` rows of blocks stay dense.
    """

    slug = "seerattention"
    title = "SeerAttention (distilled block gates)"
    paper = "https://arxiv.org/abs/2410.13276"
    code = "https://github.com/microsoft/SeerAttention"
    promises = Promises(causal=False, cross=False, decodes=False, padding=False)

    def __init__(
        self, width: int | None = None, block: int = 64, ratio: float = 0.1, threshold: float | None = None,
        theta: float | None = 10_000.0, last: int = 2,
    ):  # fmt: skip
        self.width, self.block, self.ratio = width, block, ratio
        self.threshold, self.theta, self.last = threshold, theta, last

    def build(self, heads: int) -> Attention:
        """Causal attention to the blocks of a fresh gate."""
        gate = Gate(heads, self.width, self.block, self.ratio, self.threshold, self.theta, self.last)
        return Attention(mask=Causal(), select=gate)

    def claim(self) -> ClaimNumbers:
        """Gates of the embedded model: loss on other text at 90% sparsity; and time of the program at 32768 tokens."""
        from ...study.claims import interleaved
        from ...study.probes import embedded, mean_loss, prose
        from ._gate_lessons import distil

        model, size = embedded(), 2048
        learn, held = prose("seerattention", (16, size), (4, size))
        gates = distil(model, learn, block=16, ratio=0.1, last=0)
        theta = model.config.rope_parameters["rope_theta"]
        means = Attention(select=Gate(model.config.num_attention_heads, block=16, ratio=0.1, theta=theta, last=0))
        losses = {
            "dense": mean_loss(model, held),
            "gates": mean_loss(model, held, program=lambda layer, heads: Attention(select=gates[layer])),
            "means": mean_loss(model, held, program=means),
        }
        blocks = size // 16
        keep = int((1 - math.sqrt(0.9)) * blocks)
        visited = sum(min(keep, i + 1) for i in range(blocks)) / (blocks * (blocks + 1) / 2)
        q, k, v = torch.randn(3, 1, 1, 32768, 64, generator=torch.Generator().manual_seed(0)).unbind(0)
        ours = SeerAttention(width=64).build(1)
        work = {
            "gates": partial(attention, q, k, v, ours),
            "dense": partial(scaled_dot_product_attention, q, k, v, is_causal=True),
        }
        with torch.no_grad():
            speedup = interleaved(work, 2).ratio("dense", "gates")
        worse = {name: math.exp(losses[name] - losses["dense"]) for name in ("gates", "means")}
        return ClaimNumbers.decide(
            {f"loss_{name}": round(x, 4) for name, x in losses.items()}
            | {
                "perplexity_gates_of_dense": round(worse["gates"], 4),
                "perplexity_means_of_dense": round(worse["means"], 4),
            }
            | {"most_visited": round(visited, 4), "speedup_32768": round(speedup, 2)},
            f"Visiting at most {visited:.1%} of the causal blocks, distilled gates' perplexity is {worse['gates']:.3f}"
            f" times the dense one's (the same with means in place of gates: {worse['means']:.3f}); at 32768 tokens the"
            f" program is {speedup:.1f} times as fast as SDPA.",
            ninety_percent_sparse=visited <= 0.1,
            perplexity_near_dense=worse["gates"] <= NEAR,
            learning_beats_means=worse["gates"] < worse["means"],
            several_times_faster=speedup >= FASTER,
        )
