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
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.attend import attention
from ...core.errors import SpecError
from ...core.masks import EMPTY, Causal
from ...core.selectors import Select, Selection, pool
from ...core.spec import Attention
from ...core.stats import BlockMax
from ..base import ClaimNumbers, Promises, System

NEAR = 1.05  # perplexity may be this many times the dense one
FASTER = 3.0  # "several times" as fast as dense
UNSEEN = -1e9


def turn(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """RoPE of ``[B, H, N, D]`` at positions ``[N]``; negative ones undo it. Halves are the two coordinates."""
    half = x.shape[-1] // 2
    angle = positions[:, None] * theta ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def largest(x: Tensor, size: int) -> Tensor:
    """Greatest of each run of ``size`` tokens (the last may be shorter): ``[..., N, D]`` to ``[..., N / size, D]``."""
    return F.pad(x, (0, 0, 0, -x.shape[-2] % size), value=-math.inf).unflatten(-2, (-1, size)).amax(-2)


class Gate(Select):
    """The gates of a layer. ``width``: of its heads, for a gate with a matrix; other arguments as in the system."""

    weight: nn.Parameter | None

    def __init__(
        self, heads: int, width: int | None = None, block: int = 64, ratio: float = 0.1,
        threshold: float | None = None, theta: float | None = 10_000.0, last: int = 2,
    ):  # fmt: skip
        super().__init__(block, block)
        if not 0 < ratio <= 1 or last < 0:
            raise SpecError(f"Gate needs 0 < ratio <= 1 and last >= 0; got {ratio} and {last}")
        self.ratio, self.threshold, self.theta, self.last = ratio, threshold, theta, last
        self.weight = None
        if width is not None:
            self.weight = nn.Parameter(0.02 * torch.randn(heads, 3 * width, width))

    def pooled(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Means of queries ``[B, H, nq, D]``; greatest, least and mean of keys ``[B, Hkv, nk, 3 D]``; without RoPE."""
        m = k.shape[2]
        if self.theta is not None:
            q, k = (turn(x, -torch.arange(m - x.shape[2], m, device=x.device), self.theta) for x in (q, k))
        size = self.columns
        return pool(q, size), torch.cat([largest(k, size), -largest(-k, size), pool(k, size)], -1)

    def logits(self, q: Tensor, k: Tensor, first: int = 0) -> Tensor:
        """Scores of blocks ``[B, H, nq, nk]`` from what :meth:`pooled` gives; ``first``: position of query 0."""
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        k = k[..., -q.shape[-1] :] if self.weight is None else k @ self.weight.to(k.dtype)
        if self.theta is not None:
            q, k = (
                turn(x, start + self.columns * torch.arange(x.shape[2], device=x.device), self.theta)
                for x, start in ((q, first), (k, 0))
            )
        return q @ k.mT * q.shape[-1] ** -0.5

    def choose(self, q: Tensor, k: Tensor, codes: Tensor) -> Selection:
        with torch.no_grad():
            visible = codes > EMPTY
            gate = self.logits(*self.pooled(q, k), k.shape[2] - q.shape[2]).float().masked_fill(~visible, UNSEEN)
            if self.threshold is not None:
                chosen = gate.softmax(-1) > self.threshold
            else:
                keep = max(1, int((1 - math.sqrt(1 - self.ratio)) * gate.shape[-1]))
                chosen = torch.zeros_like(gate, dtype=torch.bool).scatter_(-1, gate.topk(keep, -1).indices, True)
            if self.last:
                chosen[:, :, -self.last :] = True
            chosen &= visible
            most = max(1, int(chosen.sum(-1).max()))
            found, blocks = chosen.to(torch.int8).sort(dim=-1, descending=True, stable=True)
            return Selection(blocks[..., :most].masked_fill(found[..., :most] == 0, -1), self.rows, self.columns)


class SeerAttention(System):
    """Settings: ``width`` of the heads (``None``: gates without matrices), keys per ``block``, ``ratio`` or else
    ``threshold``, the model's RoPE base ``theta``, and how many ``last`` rows of blocks stay dense.
    """  # fmt: skip

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
        from ...study.probes import embedded
        from ...worlds.text import heldout, text

        model, size = embedded(), 2048
        cut = len(heldout()) * 3 // 4
        learn, held = (
            torch.stack([e.tokens for e in islice(text(size, "seerattention", source=part), count)])
            for part, count in ((heldout()[:cut], 16), (heldout()[cut:], 4))
        )
        gates = distil(model, learn, block=16, ratio=0.1, last=0)
        theta = model.config.rope_parameters["rope_theta"]
        means = Gate(model.config.num_attention_heads, block=16, ratio=0.1, theta=theta, last=0)
        losses = {
            "dense": _loss(model, held, None),
            "gates": _loss(model, held, gates),
            "means": _loss(model, held, [means] * len(gates)),
        }
        blocks = size // 16
        keep = int((1 - math.sqrt(0.9)) * blocks)
        visited = sum(min(keep, i + 1) for i in range(blocks)) / (blocks * (blocks + 1) / 2)
        q, k, v = torch.randn(3, 1, 1, 32768, 64, generator=torch.Generator().manual_seed(0)).unbind(0)
        ours = SeerAttention(width=64).build(1)
        work = {
            "gates": partial(attention, q, k, v, ours),
            "dense": partial(F.scaled_dot_product_attention, q, k, v, is_causal=True),
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


def distil(
    model: Any, tokens: Tensor, steps: int = 500, batch: int = 2, lr: float = 1e-3, warmup: int = 20, seed: int = 0,
    **settings: Any,
) -> list[Gate]:  # fmt: skip
    """Gates for every layer of a Llama-like model, learned from its attention on texts ``[T, N]``.

    Args:
        model: a causal model of transformers with plain RoPE, which stays as it is.
        tokens: the texts.
        steps, batch, lr, warmup: of Adam with a cosine schedule; the first quarter of each text's rows is left out.
        seed: of the first matrices and the order of the texts.
        settings: of :class:`Gate`.
    """
    from ...hosts.acts import Call
    from ...hosts.handles import listen, watch

    config = model.config
    source = torch.Generator().manual_seed(seed)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        theta = config.rope_parameters["rope_theta"]
        gates = [
            Gate(config.num_attention_heads, width, theta=theta, **settings) for _ in range(config.num_hidden_layers)
        ]
    seen: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in gates]
    pooled: dict[int, tuple[Tensor, Tensor]] = {}

    def hear(call: Call) -> None:
        pooled[call.site.layer] = gates[call.site.layer].pooled(call.q, call.k)

    with torch.no_grad(), listen(model, hear), watch(model, BlockMax(gates[0].columns)) as watching:
        for one in tokens.split(1):
            model(one, use_cache=False, logits_to_keep=1)
            for layer, found in enumerate(seen):
                teacher = watching[layer]["block_max"]
                found.append((*pooled[layer], teacher / teacher.sum(-1, keepdim=True)))
    data = [tuple(torch.cat(parts) for parts in zip(*found, strict=True)) for found in seen]
    optimizer = torch.optim.AdamW([p for gate in gates for p in gate.parameters()], lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    rows = data[0][2].shape[2]
    visible = torch.ones(rows, rows).tril().bool()
    with torch.enable_grad():
        for _ in range(steps):
            of = torch.randint(len(tokens), (batch,), generator=source)
            loss = torch.zeros(())
            for gate, (q, k, teacher) in zip(gates, data, strict=True):
                learner = gate.logits(q[of], k[of]).masked_fill(~visible, UNSEEN)[:, :, rows // 4 :].log_softmax(-1)
                loss = loss + F.kl_div(learner, teacher[of][:, :, rows // 4 :], reduction="sum") / learner.numel()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return gates


@torch.no_grad()
def _loss(model: Any, tokens: Tensor, gates: list[Gate] | None) -> float:
    """Mean loss in nats per byte, with gates in every layer or dense."""
    from ...hosts.handles import install

    def program(layer: int, heads: int) -> Attention:
        return Attention(select=None if gates is None else gates[layer])

    with install(model, program):
        found = [F.cross_entropy(model(t, use_cache=False).logits[0, :-1], t[0, 1:]) for t in tokens.split(1)]
    return float(torch.stack(found).mean())
