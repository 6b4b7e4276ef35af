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

import math
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.attend import weights
from ...core.errors import SpecError
from ...core.masks import EMPTY, Causal
from ...core.selectors import Select, Selection, TopKBlocks, pool
from ...core.spec import Attention
from ..base import ClaimNumbers, Promises, System

WINDOW, THETA, APART, PER_BLOCK = 4, 1.1, 8, 8  # keys on a side of a gap; least score; gap of cuts; cuts per block
MATCHES = 0.95  # share of the dense needles that count as the paper's "matches dense attention"


class Boundaries(nn.Module):
    """Which gaps are cuts, from keys ``[B, Hkv, M, D]``: logits ``[B, M]``, of the gap behind each key.

    Args:
        channels: ``Hkv * D``.
        heads, hidden: of its attention within ``2 * WINDOW`` keys, and width of its last layer but one.
    """

    def __init__(self, channels: int, heads: int = 4, hidden: int = 256):
        super().__init__()
        self.mix = nn.MultiheadAttention(channels, heads, batch_first=True)
        self.norm = nn.LayerNorm(channels)
        self.judge = nn.Sequential(nn.Linear(4 * channels + 1, hidden), nn.ReLU(), nn.Linear(hidden, 1))

    def forward(self, k: Tensor) -> Tensor:
        x = F.pad(k.float().transpose(1, 2).flatten(2).mT, (WINDOW - 1, WINDOW)).unfold(2, 2 * WINDOW, 1)
        x = x.permute(0, 2, 3, 1).flatten(0, 1)
        x = self.norm(self.mix(x, x, x, need_weights=False)[0]).unflatten(0, (len(k), -1))
        a, b = x[:, :, :WINDOW].mean(2), x[:, :, WINDOW:].mean(2)
        alike = F.cosine_similarity(a, b, dim=-1, eps=1e-6)[..., None]
        return self.judge(torch.cat([a, b, (a - b).abs(), a * b, alike], -1))[..., 0]


@torch.no_grad()
def ratio(w: Tensor) -> Tensor:
    """The official labels: of every gap behind a key ``[B, M]``, from weights ``[B, M, M]``; 0 near both ends."""
    m = w.shape[-1]
    mass = F.pad(w.double().flip(1).cumsum(1).flip(1).cumsum(2), (1, 0))  # of the rows from here, the keys before
    found = mass.new_zeros(w.shape[:2])
    c = torch.arange(2 * WINDOW - 1, m - 2 * WINDOW, device=w.device)
    if len(c):
        low, middle, high = (mass[:, c + WINDOW, c + 1 + shift] for shift in (-WINDOW, 0, WINDOW))
        past, future = middle - low + 1e-6, high - middle + 1e-6
        found[:, c] = torch.maximum(past, future) / torch.minimum(past, future)
    return found


def starts(score: Tensor, most: int) -> Tensor:
    """Where chunks start, bool ``[B, M]``, from the scores ``[B, M]`` of the gaps behind the keys."""
    found = []
    for row in score.tolist():
        cut, free = [True] + [False] * (len(row) - 1), [True] * len(row)
        for i in sorted((i for i, s in enumerate(row[:-1]) if s > THETA), key=lambda i: -row[i]):
            if free[i] and sum(cut) <= most:
                cut[i + 1] = True
                near = range(max(0, i - APART), min(len(row), i + APART + 1))
                for j in near:
                    free[j] = False
        found.append(cut)
    return torch.tensor(found, device=score.device)


class Chunks(Select):
    """Tokens of the best chunks; see the module. ``predictor``: as :class:`Boundaries`, or ``None``: the labels."""

    def __init__(self, predictor: nn.Module | None, budget: int, block: int, first: int, local: int, last: int):
        super().__init__(block, 1)
        if min(first, last) < 0 or local < 1 or budget < first + local:
            raise SpecError(
                f"DHSA: budget={budget} must hold first={first} and local={local} >= 1; last={last} is 0 at least"
            )
        self.predictor = predictor
        self.budget, self.first, self.local, self.last = budget, first, local, last

    @torch.no_grad()
    def choose(self, q: Tensor, k: Tensor, codes: Tensor) -> Selection:
        n = q.shape[2]
        visible = (codes > EMPTY).any(1).expand(len(q), -1, -1)
        score = self.scores(q, k).masked_fill(~visible, -math.inf)
        newest = visible & (visible.flip(-1).cumsum(-1).flip(-1) <= self.local)
        order = score.masked_fill(newest, -math.inf).argsort(stable=True, dim=-1, descending=True)
        best = torch.zeros_like(visible).scatter_(-1, order[..., : self.budget - self.local], True)
        chosen = (best & visible) | newest
        chosen = (chosen & (chosen.cumsum(-1) > self.first)) | (visible & (visible.cumsum(-1) <= self.first))
        row = torch.arange(self.rows, n + self.rows, self.rows, device=q.device)  # one behind each block's last query
        if self.last:
            chosen |= visible & (row > n - self.last)[:, None]
        most = max(1, int(chosen.sum(-1).max()))
        found, tokens = chosen.to(torch.int8).sort(dim=-1, descending=True, stable=True)
        return Selection(tokens.masked_fill(found == 0, -1)[:, None, :, :most], self.rows, 1)

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
            w = weights(q, k, Attention(mask=Causal())).mean(1)
            return ratio(F.pad(w, (0, 0, k.shape[2] - q.shape[2], 0)))
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
        select = Chunks(predictor, self.budget, self.block, self.first, self.local, self.last)
        return Attention(mask=Causal(), select=select)

    def claim(self) -> ClaimNumbers:
        """Chunks and blocks of 32 keys at equal budget in the embedded model: loss on text, and needles still found."""
        from ...study.probes import embedded
        from ...study.sparse_claims import needles_kept
        from ...worlds.text import heldout, text

        model, length, size, blocks = embedded(), 1024, 32, 6
        cut = len(heldout()) // 2
        learn, held = (
            torch.stack([e.tokens for e in islice(text(n, "dhsa", source=part), count)])
            for part, n, count in ((heldout()[:cut], length // 2, 8), (heldout()[cut:], length, 4))
        )
        ours = DHSA(blocks * size, size, first=size, local=size, last=0)
        predictor = teach(model, learn)
        programs = {
            "dense": Attention(),
            "blocks": ours.program(Even(size)),
            "blocks_per_head": Attention(select=TopKBlocks(blocks, size, first=1)),
            "chunks": ours.program(predictor),
            "chunks_of_labels": ours.program(None),
        }
        losses = {name: _loss(model, held, spec) for name, spec in programs.items()}
        reading = DHSA(ours.budget, size, size, size, self.last)
        kept = {
            name: needles_kept(lambda *_, cut=cut: reading.program(cut), length, 8)
            for name, cut in (("chunks", predictor), ("blocks", Even(size)))
        }
        return ClaimNumbers.decide(
            {"budget": ours.budget / length}
            | {f"loss_{name}": round(value, 4) for name, value in losses.items()}
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


@torch.no_grad()
def _loss(model: Any, tokens: Tensor, spec: Attention) -> float:
    """Mean loss in nats per byte with this program in every layer."""
    from ...hosts.handles import install

    with install(model, spec):
        found = [F.cross_entropy(model(t, use_cache=False).logits[0, :-1], t[0, 1:]) for t in tokens.split(1)]
    return float(torch.stack(found).mean())


class Even(nn.Module):
    """A predictor that cuts every ``size`` keys: chunks are blocks then, and this the official baseline."""

    def __init__(self, size: int):
        super().__init__()
        self.size = size

    def forward(self, k: Tensor) -> Tensor:
        behind = torch.arange(1, k.shape[2] + 1, device=k.device)
        return torch.where(behind % self.size == 0, 100.0, -100.0).repeat(len(k), 1)


def teach(model: Any, tokens: Tensor, steps: int = 80, lr: float = 1e-3, seed: int = 0) -> Boundaries:
    """One predictor for all layers of a model, from its attention on texts ``[T, N]``, by the official loss.

    That is focal cross entropy (gamma 2, of cuts 1.3 fold) on ``ratio >= 2``; a step is one text, all layers. The
    official rate, 1e-4, is for thousands of texts.
    """
    from ...hosts.acts import Call
    from ...hosts.handles import listen

    seen: list[list[tuple[Tensor, Tensor]]] = []

    def hear(call: Call) -> None:
        cut = ratio(weights(call.q, call.k, Attention(mask=Causal())).mean(1)) >= 2
        seen[-1].append((call.k, cut.float()))

    with torch.no_grad(), listen(model, hear):
        for one in tokens.split(1):
            seen.append([])
            model(one, use_cache=False, logits_to_keep=1)
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(seed)
        predictor = Boundaries(seen[0][0][0].shape[1] * seen[0][0][0].shape[3])
        optimizer = torch.optim.Adam(predictor.parameters(), lr)
        inner = slice(2 * WINDOW - 1, -2 * WINDOW)
        for step in range(steps):
            optimizer.zero_grad()
            for k, cut in seen[step % len(seen)]:
                logits, aim = predictor(k)[:, inner], cut[:, inner]
                missed = (logits.sigmoid() - aim).abs()
                loss = F.binary_cross_entropy_with_logits(logits, aim, pos_weight=aim.new_tensor(1.3), reduction="none")
                (missed.square() * loss).mean().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return predictor.requires_grad_(False)
