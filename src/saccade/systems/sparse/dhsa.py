"""DHSA: text is cut into chunks where attention changes; queries read the tokens of the chunks that they score highest.

    ratio[c]  = max(past, future) / min(past, future)    attention that the later rows pay to the ``window`` keys before
                                                         and behind the gap c, mean of the heads
    cuts      = gaps of greatest ratio above ``THETA``, more than ``APART`` apart, 8 m / block of them at most
    chunk     = sum of its keys / sqrt(their number)     mean times the root of the length; keys are means of heads
    score     = mean of a block of queries . chunk       the same for all tokens of a chunk
    tokens    = the ``local`` newest, and the best of the others up to ``budget``; of these the earliest ``first``
                give way to the first ``first`` of the text

A small network (:class:`Boundaries`) learns from keys alone where ratio >= 2, so that nothing dense is left.

Paper: Long-Context Modeling with Dynamic Hierarchical Sparse Attention for On-Device LLMs, arXiv:2510.24606
Code: https://github.com/xiongsiheng/DHSA (legacy: boundary_predictor/{models,loss,train}.py: BoundarySimilarityAttn;
    utils/helper.py: label_boundaries, _obtain_dhsa_mask, dhsa_sdpa; utils/{monkeypatch,flags_config}.py: defaults)

Differs: official weights could not be had, so :func:`teach` trains the network anew; without one the cuts are its
labels, from the attention itself and as dear as dense attention (the official code does the same while training). Every
layer has its own cuts (official scripts share the first layer's). All of a block that holds one of the ``last`` queries
sees every key, and no cut is forced before them. Among tokens of one score the earliest are taken (official: whichever
topk names), and none is counted twice (official: the last of the first block, 65 times). As there, queries of a block
choose together, all heads alike, and decoding is dense. The authors' newer code (DHSA_patch.py) has no chunks any more.
The claim reads prose and a few needles: with no dense queries none of four contestants found a single needle.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...core.errors import SpecError
from ...core.masks import EMPTY, Causal
from ...core.selectors import Select, Selection, TopKBlocks, pool
from ...core.spec import Attention
from ..base import ClaimNumbers, Promises, System
from ._boundaries import PER_BLOCK, WINDOW, Boundaries, Even, own_ratio, starts, teach
from ._vertical_slash import largest, listed

MATCHES = 0.95  # share of the dense needles that count as the paper's "matches dense attention"


class Chunks(Select):
    """Tokens of the best chunks; see the module. ``predictor``: as :class:`Boundaries`, or ``None``: the labels."""

    def __init__(self, predictor: nn.Module | None, budget: int, block: int, first: int, local: int, last: int):
        super().__init__(block, 1)
        if min(first, last) < 0 or local < 1 or budget < first + local:
            raise SpecError(f"DHSA: budget={budget} must hold first={first} and local={local} >= 1; last={last} >= 0")
        self.predictor = predictor
        self.budget, self.first, self.local, self.last = budget, first, local, last

    @torch.no_grad()
    def choose(self, q: Tensor, k: Tensor, codes: Tensor) -> Selection:
        visible = (codes > EMPTY).any(1).expand(len(q), -1, -1)
        score = self.scores(q, k).masked_fill(~visible, -torch.inf)
        newest = visible & (visible.flip(-1).cumsum(-1).flip(-1) <= self.local)
        best = largest(score.masked_fill(newest, -torch.inf), self.budget - self.local)
        chosen = (best & visible) | newest
        chosen = (chosen & (chosen.cumsum(-1) > self.first)) | (visible & (visible.cumsum(-1) <= self.first))
        row = self.rows * torch.arange(1, visible.shape[1] + 1, device=q.device)  # one behind each block's last query
        if self.last:
            chosen |= visible & (row > q.shape[2] - self.last)[:, None]
        return listed(chosen[:, None], self.rows, 1)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """Of every key for every block of queries, ``[B, nq, M]``."""
        m, exact = k.shape[2], torch.promote_types(q.dtype, torch.float32)
        chunk = starts(self.cuts(q, k), m // self.rows * PER_BLOCK).cumsum(-1) - 1
        length = torch.zeros(len(chunk), int(chunk.max()) + 1, dtype=exact, device=k.device)
        length = length.scatter_add(1, chunk, torch.ones_like(chunk, dtype=exact)).clamp(min=1)
        keys = k.to(exact).mean(1)
        total = keys.new_zeros(*length.shape, keys.shape[-1])
        total.scatter_add_(1, chunk[..., None].expand_as(keys), keys)
        # The official code also scales a block's mean query by the root of its length: no order depends on it.
        score = pool(q.to(exact).mean(1), self.rows) @ (total / length.sqrt()[..., None]).mT
        return score.gather(2, chunk[:, None].expand(-1, score.shape[1], -1))

    def cuts(self, q: Tensor, k: Tensor) -> Tensor:
        """How much each gap is a cut, ``[B, M]``."""
        if self.predictor is None:
            return own_ratio(q, k)
        logits = self.predictor(k)
        logits[:, : WINDOW - 1] = logits[:, -WINDOW:] = -100
        return logits


class DHSA(System):
    """Settings: ``budget`` of keys per query, queries of a ``block``, forced ``first`` and ``local`` keys, ``last``
    queries that see all, and ``channels`` (key heads times their width) of a fresh predictor (``None``: labels)."""

    slug = "dhsa"
    title = "Dynamic hierarchical sparse attention"
    paper = "https://arxiv.org/abs/2510.24606"
    code = "https://github.com/xiongsiheng/DHSA"
    promises = Promises(
        causal=False, cross=False, decodes=False, padding=False, unit_rows=True, training_free=True,
        needs_training=False,
    )  # fmt: skip

    def __init__(
        self, budget: int = 1024, block: int = 64, first: int = 128, local: int = 128, last: int = 64,
        channels: int | None = None,
    ):  # fmt: skip
        self.budget, self.block, self.first, self.local, self.last = budget, block, first, local, last
        self.channels = channels

    def build(self, heads: int) -> Attention:
        """Softmax over the chosen tokens. Raises: SpecError for a budget that does not hold what is forced."""
        return self.program(None if self.channels is None else Boundaries(self.channels).requires_grad_(False))

    def program(self, predictor: nn.Module | None) -> Attention:
        """The same with a given predictor, or with ``None``: with the labels."""
        chunks = Chunks(predictor, self.budget, self.block, self.first, self.local, self.last)
        return Attention(mask=Causal(), select=chunks)

    def claim(self) -> ClaimNumbers:
        """Chunks and blocks of 32 keys at equal budget in the embedded model: loss on text, and needles still found."""
        from ...study.probes import embedded, mean_loss, prose
        from ...study.sparse_claims import needles_kept

        model, length, size, blocks = embedded(), 1024, 32, 6
        learn, held = prose("dhsa", (8, length // 2), (4, length), share=0.5)
        ours = DHSA(blocks * size, size, first=size, local=size, last=0)
        predictor = teach(model, learn)
        programs = {
            "dense": Attention(),
            "blocks": ours.program(Even(size)),
            "blocks_per_head": Attention(select=TopKBlocks(blocks, size, first=1)),
            "chunks": ours.program(predictor),
            "chunks_of_labels": ours.program(None),
        }
        losses = {name: mean_loss(model, held, program=spec) for name, spec in programs.items()}
        reading = DHSA(ours.budget, size, size, size, self.last)
        kept = {
            name: needles_kept(lambda *_, cut=cut: reading.program(cut), length, 8)
            for name, cut in (("chunks", predictor), ("blocks", Even(size)))
        }
        return ClaimNumbers.decide(
            {f"loss_{name}": round(value, 4) for name, value in losses.items()}
            | {f"needles_{n}": round(x, 3) for n, x in kept.items()},
            f"Reading {ours.budget} of {length} keys, the embedded model's loss is {losses['chunks']:.4f} nats per byte"
            f" with predicted chunks ({losses['chunks_of_labels']:.4f} with the labels), {losses['blocks']:.4f} with"
            f" blocks of {size} for all heads alike, {losses['blocks_per_head']:.4f} with each head's own, and"
            f" {losses['dense']:.4f} dense. With the last {self.last} queries dense, as the official code has them,"
            f" {kept['chunks']:.0%} of its needles are still found ({kept['blocks']:.0%} with blocks for all heads).",
            above_blocks=losses["chunks"] < losses["blocks"],
            above_blocks_of_each_head=losses["chunks"] < losses["blocks_per_head"],
            needles_as_dense=kept["chunks"] >= MATCHES,
        )
