"""MoBA: every query reads its own block of keys and the few past blocks whose mean key it likes best.

    gate[i, j] = q[i] . mean(k in block j)                    of the blocks before the query's own, else -inf
    gate[i, own(i)] = inf
    w[i] = softmax(q[i] . k / sqrt(D)) over the keys k <= i of the ``keep`` blocks with the greatest gate[i]

Paper: MoBA: Mixture of Block Attention for Long-Context LLMs, arXiv:2502.13189
Code: https://github.com/MoonshotAI/MoBA (moba/moba_naive.py, moba/moba_efficient.py); top 3 of blocks of 512 as in the
    paper's scaling laws

Differs: nothing in the formula; the gate is in float32 at least, as theirs. The official kernel gathers the queries of
each key block and merges by log-sum-exp. Here ``rows`` neighbouring queries visit the union of their blocks, and what a
query did not choose is closed to it by columns appended to queries and keys: exact, and as cheap as neighbours agree.
The official wrapper decodes with full attention; here decoding routes as prefill does. A closed key has a score of
about -1e37, not -inf, so a model's soft cap would open it again: not for models with one.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core import masks
from ...core.attend import explain
from ...core.errors import SpecError
from ...core.scores import Dot
from ...core.selectors import Select, Selection, pool
from ...core.spec import Attention
from ..base import ClaimNumbers, Promises, System
from ._routed_blocks import own_and_best
from ._vertical_slash import listed

LOSS = 1e-3  # nats: the paper's bound on the difference of MoBA's and full attention's loss
SPIKE = 0.02  # share of the loss by which a switch of the trained model to full attention may change it


class Routed(Dot):
    """Scaled dot product with one more column per key block: of a key 1 in its own block's, of a query 0.

    A query's column is then set to a great negative number where the block is closed to it (see :class:`Route`).
    """

    def __init__(self, block: int):
        super().__init__()
        self.block = block

    def prepare(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """``[B, H, N, D + nk]`` and ``[B, Hkv, M, D + nk]``. Raises: SpecError at a second width D."""
        factor = q.shape[-1] ** -0.5
        if self.factor not in (None, factor):
            raise SpecError(f"MoBA: this program was used at another width than {q.shape[-1]}; build one for each")
        self.factor = factor
        own = torch.arange(k.shape[2], device=k.device) // self.block
        columns = F.one_hot(own).to(k.dtype).expand(*k.shape[:3], -1)
        q = F.pad(q, (0, columns.shape[-1]))
        q.routed = True  # type: ignore[attr-defined]
        return q, torch.cat([k, columns], -1)


class Route(Select):
    """Top ``keep`` blocks of every query, its own among them; the union of them for ``share`` neighbours."""

    def __init__(self, block: int, keep: int, share: int):
        super().__init__(1, block)  # the mask is asked about every query: its newest visible block is its own
        self.keep, self.share = keep, share

    @torch.no_grad()
    def choose(self, q: Tensor, k: Tensor, codes: Tensor) -> Selection:
        count = codes.shape[-1]
        routed = hasattr(q, "routed")  # an explanation asks about queries as they are
        width = q.shape[-1] - count * routed
        chosen = self.routes(q[..., :width], k[..., :width], codes)
        if routed:
            q[..., width:].masked_fill_(~chosen, -torch.finfo(q.dtype).max / 2)
        union = F.pad(chosen, (0, 0, 0, -chosen.shape[2] % self.share)).unflatten(2, (-1, self.share)).any(3)
        return listed(union, self.share, self.columns)

    def routes(self, q: Tensor, k: Tensor, codes: Tensor) -> Tensor:
        """Which blocks each query reads, bool ``[B, H, N, nk]``."""
        wide = torch.promote_types(q.dtype, torch.float32)
        mean = pool(k.to(wide), self.columns).repeat_interleave(q.shape[1] // k.shape[1], 1)
        gate = q.to(wide) @ mean.mT
        return Selection(own_and_best(gate, codes, self.keep - 1), 1, 1).dense(*gate.shape[2:])


class MoBA(System):
    """Settings: ``block``, its keys; ``keep``, blocks per query, its own among them; ``rows`` that visit together."""

    slug = "moba"
    title = "Mixture of block attention"
    paper = "https://arxiv.org/abs/2502.13189"
    code = "https://github.com/MoonshotAI/MoBA"
    promises = Promises(cross=False, unit_rows=True)

    def __init__(self, block: int = 512, keep: int = 3, rows: int = 64):
        self.block, self.keep, self.rows = block, keep, rows

    def build(self, heads: int) -> Attention:
        """Softmax over the routed blocks."""
        if self.keep < 1:
            raise SpecError(f"MoBA: keep={self.keep} must be at least 1, the query's own block")
        return Attention(Routed(self.block), masks.Causal(), select=Route(self.block, self.keep, self.rows))

    def claim(self) -> ClaimNumbers:
        """The paper's three: loss as full attention's (its 81% sparsity), the switch to full, and cost on long text."""
        from ...study import prefilling
        from ...study.trainer import Setup, batches, compare, next_token

        full = Attention(mask=masks.Causal())
        setup = Setup(steps=60, seeds=(0, 1))  # 16 blocks of its 128 tokens, top 3: as 8192 tokens in blocks of 512
        result = compare({"full": lambda s, layer: full, "moba": lambda s, layer: MoBA(8, 3, 16).build(s.heads)}, setup)
        excess = result.excess("moba", "full")
        spikes = []
        for model in result.models["moba"]:
            tokens = next(batches(setup.validation, setup, 20_000))
            with torch.no_grad():
                before = float(next_token(model, tokens))
                for layer in model.attentions:
                    layer.spec = full
                spikes.append(float(next_token(model, tokens)) / before - 1)
        call = prefilling.calls(8192)[1]  # of a layer that has looked once: what the embedded model makes of prose
        q, k, heads = call.q, call.k, call.q.shape[1]
        speed, _ = prefilling.speedup([call], lambda _: MoBA(128).build(heads), rounds=3)  # the paper's 95% sparsity
        more, less = (explain(MoBA().build(heads), q[:, :, :n], k[:, :, :n]).visited for n in (8192, 4096))
        power = 2 + math.log2(more / less)
        return ClaimNumbers.decide(
            result.numbers()
            | {
                "excess_loss": round(excess.mean, 4), "excess_error": round(excess.error, 4),
                "switched_loss_change": [round(x, 4) for x in spikes],
                "speedup_8192": round(speed, 3), "visited_exponent": round(power, 3),
            },
            f"With 3 of 16 blocks, after {setup.steps} steps, loss {excess.mean:+.4f} nats per byte (standard error"
            f" {excess.error:.4f}) from full attention's {result.mean('full'):.4f}; switched to full, it changes by"
            f" {max(spikes, key=abs):+.2%}. On 8192 bytes of text, 3 of 64 blocks take 1/{speed:.2f} of SDPA's time;"
            f" blocks of 512 visit N^{power:.2f} keys.",
            loss_within_a_thousandth=excess.mean <= LOSS,
            no_spike_at_the_switch=max(map(abs, spikes)) <= SPIKE,
            faster_than_full=speed > 1,
            sub_quadratic=power < 2,
        )  # fmt: skip
