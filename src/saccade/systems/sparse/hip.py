"""HiP attention: a tree search finds the key blocks with the greatest scores, for each block of queries.

    n = keep / columns nodes share the visible key blocks older than the window; until every node is one block:
        split each node in two halves;  score(half) = max of q . k over the half's first block and every second query
        keep the n halves of greatest score
    attend to the n blocks and to the window, causally, with softmax

A level costs the same at every length and there are log2(blocks / n) levels: T log T (of which the factor log(T / keep)
makes T ** 1.5 at a few times ``keep``, which is what is promised). Where ``keep`` keys or fewer are older than the
window, all of them stay.

Paper: A Training-Free Sub-quadratic Cost Transformer Model Serving Framework with Hierarchically Pruned Attention,
    arXiv:2406.09827
Code: https://github.com/DeepAuto-AI/hip-attention (src/hip_attn/v1_1/attention2_draft.py:
    masking_iteration_draft_numba_kernel; defaults of src/hip_attn/v1_0/attention1_block_gpu.py: hip_attention)

Differs: the window is cut in blocks and counted from the end of a query block, so that its first queries see up to a
block more. A node is represented by its first block, as in the code (the paper's text: by its middle token). Every
second query is counted back from the block's last, which is the code's choice for a full block and keeps the query of a
block of one. No SparQ, no sifters, no random sampling within a node, no dense first layers, no key offloading.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from ...core import masks
from ...core.errors import SpecError
from ...core.selectors import Select, Selection
from ...core.spec import Attention
from ..base import ClaimNumbers, Promises, System

CELLS = 2**23  # numbers gathered at once by the search
LENGTHS = (4096, 8192, 16_384)  # of the cost curve
BEND = 1.5  # growth of the cost per token from one doubling to the next: T log T has 1, T ** 2 has 2
ABOVE = 0.1  # by how much its recall of the greatest scores must exceed that of equally many local or strided keys
KEPT = 0.9  # share of the dense needles that must still be found


class TreeSearch(Select):
    """Chooses blocks as described above; ``window`` and ``keep`` count keys, multiples of ``columns``."""

    def __init__(self, keep: int, rows: int, columns: int, window: int):
        super().__init__(rows, columns)
        if keep < columns or keep % columns or window < 0 or window % columns:
            raise SpecError(
                f"TreeSearch: keep={keep} and window={window} must be multiples of columns={columns}, keep above 0"
            )
        self.keep, self.window = keep, window

    def choose(self, q: Tensor, k: Tensor, codes: Tensor) -> Selection:
        with torch.no_grad():
            batch, heads, n, width = q.shape
            nq, nk, nodes = -(-n // self.rows), codes.shape[-1], self.keep // self.columns
            newest = torch.where(codes > masks.EMPTY, torch.arange(nk, device=q.device), -1).amax(-1)
            newest = newest.expand(batch, heads, nq)
            older = (newest + 1 - self.window // self.columns).clamp(min=0)  # blocks that the tree shares out
            queries = torch.nn.functional.pad(q, (0, 0, 0, nq * self.rows - n)).unflatten(2, (nq, self.rows))
            keys = torch.nn.functional.pad(k, (0, 0, 0, nk * self.columns - k.shape[2])).unflatten(2, (nk, -1))
            keys = keys.repeat_interleave(heads // k.shape[1], 1)
            found = torch.arange(nodes, device=q.device).expand(batch, heads, nq, nodes)
            found = found.masked_fill(found >= older[..., None], -1)  # a tensor of its own, filled in below
            step = max(1, CELLS // (2 * nodes * self.columns * width))
            full = (older > nodes).nonzero()
            for at in range(0, len(full), step):
                b, h, i = full[at : at + step].unbind(-1)
                asked = queries[b[:, None], h[:, None], i[:, None], self._rows(n, i)]
                found[b, h, i] = self._search(asked, keys, b, h, older[b, h, i])
            near = newest[..., None] - torch.arange((self.window + self.rows) // self.columns + 1, device=q.device)
            found = found.masked_fill(found >= near[..., -1:], -1)
            return Selection(torch.cat([found, near.clamp(min=-1)], -1), self.rows, self.columns)

    def _rows(self, n: int, block: Tensor) -> Tensor:
        """Which queries of the blocks are scored ``[T, rows / 2]``: every second, back from the last of each."""
        last = (n - block * self.rows).clamp(max=self.rows)[:, None] - 1
        row = last - torch.arange(0, self.rows, 2, device=block.device)
        return torch.where(row < 0, last, row)  # one twice changes no maximum

    def _search(self, q: Tensor, keys: Tensor, b: Tensor, h: Tensor, blocks: Tensor) -> Tensor:
        """The best of ``blocks`` ``[T]`` key blocks for some queries ``[T, r, D]`` each: numbers ``[T, nodes]``."""
        nodes = self.keep // self.columns
        edges = torch.arange(nodes + 1, device=q.device) * blocks[:, None] // nodes
        start, size = edges[:, :-1], edges.diff(dim=-1)
        while int(size.max()) > 1:
            middle = start + size // 2
            halves = torch.stack([start, middle], -1).flatten(1)
            sizes = torch.stack([middle - start, start + size - middle], -1).flatten(1)
            first = keys[b[:, None], h[:, None], halves].flatten(1, 2)
            score = (q @ first.mT).amax(1).unflatten(-1, (-1, self.columns)).amax(-1)
            score = score.masked_fill(sizes < 1, -math.inf)
            best = score.topk(nodes, -1).indices
            start, size = halves.gather(1, best), sizes.gather(1, best)
        return start


class HiP(System):
    """Settings: ``keep`` keys found and a ``window`` of newest, by blocks of ``rows`` queries and ``columns`` keys.

    Queries of a block choose together: exact decoding and strict causality need ``rows=1``.
    """

    slug = "hip"
    title = "HiP attention (hierarchical pruning)"
    paper = "https://arxiv.org/abs/2406.09827"
    code = "https://github.com/DeepAuto-AI/hip-attention"
    promises = Promises(cross=False, exponent=1.5, unit_rows=True, training_free=True, needs_training=False)

    def __init__(self, keep: int = 512, rows: int = 32, columns: int = 2, window: int = 128):
        self.keep, self.rows, self.columns, self.window = keep, rows, columns, window

    def promised(self) -> Promises:
        """Causal, decoding and padding only where every query chooses alone."""
        alone = self.rows == 1
        return replace(self.promises, causal=alone, decodes=alone, padding=alone)

    def build(self, heads: int) -> Attention:
        """Causal softmax over what the search finds."""
        return Attention(mask=masks.Causal(), select=TreeSearch(self.keep, self.rows, self.columns, self.window))

    def claim(self) -> ClaimNumbers:
        """Inside the embedded model: recall of the greatest scores, and needles; then the cost per token by length."""
        from ...study.sparse_claims import Recall, needles_kept, operations

        search = Recall(TreeSearch(self.keep, self.rows, self.columns, self.window), self.keep, self.window)
        program = Attention(mask=masks.Causal(), select=search)
        found = needles_kept(lambda layer, heads: program, length=2048, examples=8)
        recalls = search.means()
        specs = {"hip": self.build(1), "dense": Attention(mask=masks.Causal())}
        costs = {name: [operations(spec, n) / n for n in LENGTHS] for name, spec in specs.items()}
        bends = {name: (c - b) / (b - a) for name, (a, b, c) in costs.items()}
        return ClaimNumbers.decide(
            {"needles_kept": round(found, 3), "recall_hip": round(recalls["chosen"], 3)}
            | {f"recall_{name}": round(recalls[name], 3) for name in ("local", "strided")}
            | {f"operations_per_token_{name}": [round(c) for c in cost] for name, cost in costs.items()}
            | {f"bend_{name}": round(bend, 3) for name, bend in bends.items()},
            f"Of a text's last query's {self.keep} greatest scores the search visits {recalls['chosen']:.0%} (as many"
            f" local keys: {recalls['local']:.0%}, strided: {recalls['strided']:.0%}); {found:.0%} of the needles that"
            f" the model finds are still found. From one doubling of the length to the next the cost per token grows"
            f" {bends['hip']:.2f} times as much (T log T: 1, dense: {bends['dense']:.2f}).",
            recall_above_local=recalls["chosen"] >= recalls["local"] + ABOVE,
            recall_above_strided=recalls["chosen"] >= recalls["strided"] + ABOVE,
            needles_kept=found >= KEPT,
            t_log_t=bends["hip"] <= BEND,
        )
