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
whose keys arrive with positions; so the offloaded cache is not here, and the claim's model has no positions: its pass
key is the one in the block of a star, its text 16 times as long as what it was taught with. Group dropout is left out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core import masks
from ...core.errors import SpecError
from ...core.normalizers import HIDDEN, Normalizer, Softmax
from ...core.selectors import Select, Selection
from ...core.spec import Attention
from ...core.tile import At
from ..base import ClaimNumbers, Promises, System
from ._routed_blocks import own_and_best

TEXT, TAUGHT, LONG = 15, 8, 128  # of the claim: text per block, and blocks; the paper goes from 2k to 32k tokens
KEPT = 2  # blocks retrieved
FOUND = 0.9  # share of the pass keys


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
        score = F.pad(score, (0, codes.shape[-1] - score.shape[-1]))  # the last block may lack its landmark
        return Selection(own_and_best(score, codes, self.keep), 1, self.columns)


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
        """Pass keys in a text of many blocks, found by a model that was taught with few; all blocks and some."""
        from ...study.passkeys import read_starred, teach_starred
        from ...worlds.starred import KEYS

        program = {keep: Landmark(TEXT, keep).build(2) for keep in (None, TAUGHT, KEPT, 1)}
        model = teach_starred(program[None], 2, TAUGHT, TEXT)
        found = {
            f"{blocks} blocks, {keep} retrieved": read_starred(model, program[keep], blocks, TEXT)[1]
            for blocks in (TAUGHT, LONG)
            for keep in (KEPT, 1)
        }
        every, grouped = (read_starred(model, program[keep], TAUGHT, TEXT)[0] for keep in (TAUGHT, None))
        difference = float((every - grouped).abs().max())
        alone = Attention(mask=masks.Causal() & masks.Blocks(TEXT + 1), normalizer=GroupedSoftmax(TEXT + 1))
        own = read_starred(model, alone, LONG, TEXT)[1]
        told = ", ".join(f"{name}: {share:.0%}" for name, share in found.items())
        return ClaimNumbers.decide(
            {"found": found, "own_block_alone": own, "difference_all_retrieved": difference},
            f"Pass keys found by a model taught with texts of up to {TAUGHT} blocks of {TEXT} tokens: {told}; {own:.0%}"
            f" of those in {LONG} blocks with the query's own alone ({1 / KEYS:.0%} is chance). All blocks retrieved"
            f" change no logit by more than {difference:.1e} from the grouped softmax.",
            all_blocks_are_the_grouped_softmax=difference < 1e-4,
            found_beyond_the_taught_length=found[f"{LONG} blocks, {KEPT} retrieved"] >= FOUND,
            by_retrieval=own < 2 / KEYS,
        )
