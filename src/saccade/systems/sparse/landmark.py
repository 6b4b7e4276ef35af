"""Landmark attention: the last token of each block is its landmark, whose weight says how much of the block is read.

    inside[i, j] = softmax of q[i] . k / sqrt(D) over the text of j's block
    gate[i, b]   = softmax over the blocks b up to the query's own of
                   q[i] . k[landmark of b] / sqrt(D)               for an earlier block
                   log sum exp of q[i] . k / sqrt(D) over its text  for the query's own, up to i
    w[i, j] = inside[i, j] * gate[i, block(j)];  landmarks weigh nothing themselves

So the own block's text and the earlier landmarks share one softmax, and a landmark hands its weight to its block. With
``keep`` given, only the blocks with the ``keep`` greatest landmark scores are read, and the query's own.

Paper: Landmark Attention: Random-Access Infinite Context Length for Transformers, arXiv:2305.16300
Code: https://github.com/epfml/landmark-attention (landmark_grouped_softmax and LlamaAttention in llama/llama_mem.py,
    last_section_mask in lm_benchmark/models/landmark.py); 50 tokens and a landmark in each block

Differs: landmarks are known by their place, every ``block`` + 1st token from position 0 (where the official code puts
them), not by their id. Every query and head retrieves for itself, as the official cache without offloading; but the
official code retrieves from its cache alone and reads the current chunk whole, and here there are no chunks. The new
positions that it gives to retrieved keys (needed by a rotary model beyond its training length) are left to the model,
whose keys arrive with positions; so the offloaded cache and the passkey at 32k are not here. Group dropout is left out.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core import masks
from ...core.errors import SpecError
from ...core.normalizers import HIDDEN, Normalizer, Softmax
from ...core.selectors import Select, Selection
from ...core.spec import Attention
from ...core.tile import At
from ..base import ClaimNumbers, Promises, System

if TYPE_CHECKING:
    from ...nn import GPT
    from ...study.trainer import Setup


TEXT, BLOCKS, KEPT = 15, 8, 2  # of the claim: text per block, blocks, blocks retrieved
PARITY = 1.02  # loss may be so many times that of a softmax without landmarks
GAIN = 0.5  # share of what earlier blocks are worth that the retrieved ones must keep


class GroupedSoftmax(Normalizer):
    """The paper's grouped softmax; every ``size``-th key is the landmark of the ``size - 1`` before it."""

    unit_rows = True

    def __init__(self, size: int):
        super().__init__()
        self.size = size

    def forward(self, scores: Tensor, at: At) -> Tensor:
        size, width = self.size, scores.shape[-1]
        lead = 0 if at.first is None else at.first % size
        scores = F.pad(scores, (lead, -(lead + width) % size), value=HIDDEN).unflatten(-1, (-1, size))
        text, landmark = scores[..., :-1], scores[..., -1]
        number = self._numbers(at, lead)
        own = number == torch.div(at.row, size, rounding_mode="floor")
        top = text.amax(-1, keepdim=True).detach()
        raised = torch.exp(text - top.masked_fill(top == HIDDEN, 0))
        total = raised.sum(-1, keepdim=True)
        empty = total == 0
        total = total.masked_fill(empty, 1)
        whole = (total.log() + top.masked_fill(empty, 0)).masked_fill(empty, HIDDEN)[..., 0]
        gate = Softmax().forward(torch.where(own, whole, landmark), at)
        weights = F.pad(raised / total * gate[..., None], (0, 1))
        return weights.flatten(-2)[..., lead : lead + width]

    def _numbers(self, at: At, lead: int) -> Tensor:
        """Block numbers ``[..., 1, blocks]`` of a tile: a range of keys, or whole blocks gathered."""
        if at.first is not None:
            k = at.k[..., :1] - lead + torch.arange(0, lead + at.k.shape[-1], self.size, device=at.k.device)
        else:
            k = at.k[..., :: self.size]
            if bool((k % self.size).any()):
                raise SpecError(
                    f"landmark attention needs whole blocks of {self.size} keys; this mask has holes in them"
                )
        return torch.div(k, self.size, rounding_mode="floor")


class Retrieve(Select):
    """For each query its own block, and the ``keep`` earlier ones whose landmarks it likes best."""

    def __init__(self, size: int, keep: int):
        super().__init__(1, size)
        self.keep = keep

    @torch.no_grad()
    def choose(self, q: Tensor, k: Tensor, codes: Tensor) -> Selection:
        landmarks = k[:, :, self.columns - 1 :: self.columns].repeat_interleave(q.shape[1] // k.shape[1], 1)
        score = q @ landmarks.mT
        count = codes.shape[-1]
        score = F.pad(score, (0, count - score.shape[-1]))  # the last block may lack its landmark
        order = torch.arange(count, device=q.device)
        own = torch.where(codes > masks.EMPTY, order, -1).amax(-1, keepdim=True)
        past = (codes > masks.EMPTY) & (order < own)
        best, blocks = score.masked_fill(~past, HIDDEN).topk(min(self.keep, count), -1)
        own = own.expand(*blocks.shape[:-1], 1)
        return Selection(torch.cat([blocks.masked_fill(best == HIDDEN, -1), own], -1), 1, self.columns)


class Landmark(System):
    """Settings: ``block``, text tokens per landmark; ``keep``, retrieved blocks (``None``: all)."""

    slug = "landmark"
    title = "Landmark attention"
    paper = "https://arxiv.org/abs/2305.16300"
    code = "https://github.com/epfml/landmark-attention"
    promises = Promises(cross=False, unit_rows=True)

    def __init__(self, block: int = 50, keep: int | None = None):
        self.block, self.keep = block, keep

    def build(self, heads: int) -> Attention:
        """The grouped softmax, with retrieval if ``keep`` is given. Raises: SpecError for blocks without text."""
        if self.block < 1 or (self.keep is not None and self.keep < 1):
            raise SpecError(f"Landmark: block={self.block} and keep={self.keep} must be at least 1")
        select = None if self.keep is None else Retrieve(self.block + 1, self.keep)
        return Attention(mask=masks.Causal(), normalizer=GroupedSoftmax(self.block + 1), select=select)

    def claim(self) -> ClaimNumbers:
        """A small model trained with landmarks: its loss, and what is left of it with few blocks retrieved."""
        from ...study.trainer import Setup

        setup = Setup(steps=100)
        plain, _ = _train(setup, Attention(mask=masks.Causal()))
        whole, model = _train(setup, Landmark(TEXT).build(setup.heads))
        every, few = (_loss(model, setup, Landmark(TEXT, keep).build(setup.heads)) for keep in (BLOCKS, KEPT))
        own = _loss(
            model, setup, Attention(mask=masks.Causal() & masks.Blocks(TEXT + 1), normalizer=GroupedSoftmax(TEXT + 1))
        )
        kept = (own - few) / (own - whole)
        found = ClaimNumbers.decide(
            {
                "loss_softmax": round(plain, 4), "loss_landmark": round(whole, 4),
                "loss_all_retrieved": round(every, 4), "loss_retrieved": round(few, 4),
                "loss_own_block": round(own, 4), "gain_kept": round(kept, 3),
            },
            f"After {setup.steps} steps with landmarks every {TEXT} bytes, loss {whole:.4f} nats per byte (softmax"
            f" without them {plain:.4f}). All {BLOCKS} blocks retrieved: {every:.4f}; {KEPT} of them: {few:.4f}; the"
            f" own alone: {own:.4f}, so {KEPT} blocks keep {kept:.0%} of the {own - whole:.4f} that the earlier text is"
            " worth. The passkey beyond the training length is not"
            " measured: it needs the model's positions to be dealt anew.",
            all_blocks_are_the_grouped_softmax=abs(every - whole) < 1e-4,
            loss_as_without=whole <= PARITY * plain,
            gain_kept=kept >= GAIN,
        )  # fmt: skip
        # What the paper claims first, text beyond the training length, is not among the conditions.
        return replace(found, verdict="not measured") if found.verdict == "holds" else found


def _batches(source: bytes, setup: Setup, seed: int) -> Iterator[Tensor]:
    """Batches ``[batch, BLOCKS * (TEXT + 1)]``: text, and after every TEXT bytes a zero byte, the landmark."""
    from ...worlds.text import text

    stream = text(BLOCKS * TEXT, seed, source=source)
    while True:
        tokens = torch.stack([example.tokens for example in islice(stream, setup.batch)])
        yield F.pad(tokens.unflatten(-1, (BLOCKS, TEXT)), (0, 1)).flatten(1)


def _error(model: GPT, tokens: Tensor, landmarks: bool) -> Tensor:
    """Cross entropy of the text, nats per byte; without landmarks they are taken out first."""
    if not landmarks:
        tokens = tokens[tokens != 0].view(len(tokens), -1)
    aims = tokens[:, 1:].masked_fill(tokens[:, 1:] == 0, -100)
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), aims.flatten(), ignore_index=-100)


def _train(setup: Setup, spec: Attention) -> tuple[float, GPT]:
    """Validation loss of a small model with this program in every layer, and the model."""
    from ...study.trainer import tiny

    model = tiny(setup, lambda setup, layer: spec, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=setup.lr, betas=(0.9, 0.95))
    for tokens in islice(_batches(setup.training, setup, 0), setup.steps):
        optimizer.zero_grad()
        _error(model, tokens, isinstance(spec.normalizer, GroupedSoftmax)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return _loss(model, setup, spec), model


@torch.no_grad()
def _loss(model: GPT, setup: Setup, spec: Attention) -> float:
    """Validation loss with this program in every layer."""
    for layer in model.attentions:
        layer.spec = spec
    held = islice(_batches(setup.validation, setup, 10_000), 4)
    return statistics.fmean(float(_error(model, x, isinstance(spec.normalizer, GroupedSoftmax))) for x in held)
