"""S2-Attention: each head sees its own shard of the past, every ``stride``-th block, and all heads see what is near.

    away        = q // block - k // block
    visible[h]  = (k <= q) and (away < local  or  (k // block + h * step + shift) % stride == 0)
    step        = max(1, stride // heads)

Neighbouring heads see neighbouring shards. With no fewer shards than ``stride`` they together are the whole past;
each costs ``local + blocks / stride`` blocks a query. The keys of a shard do not depend on the query, so a head's cache
holds its shard and the window alone.

Paper: Efficient LLM Training and Serving with Heterogeneous Context Sharding among Attention Heads, arXiv:2407.17678
Code: https://github.com/linxihui/dkernel (dkernel/utils.py: get_sparse_attn_mask, whose defaults these are;
    dkernel/interface.py: LocalStrideSparseAttention)

Differs: nothing in the causal pattern; the bidirectional one (shards by distance) and ``homo_head`` are left out. As
there, with fewer shards than ``stride`` some blocks are in none (with fewer heads, step > 1, they lie apart): a query
sees them while they are near; :meth:`S2.complete` tells. Heads that share keys share a shard if ``kv_heads`` says so.
Here the tiles of the executor take the place of the kernel, and nothing is dropped from the cache.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ...core import masks
from ...core.attend import attention
from ...core.errors import SpecError
from ...core.masks import Mask, Span
from ...core.spec import Attention
from ...core.tile import At
from ..base import ClaimNumbers, Promises, System
from .block_masks import NearBlocks, codes

NEAR = 1.5  # the speed-up is near the inverse density within this factor
PERFECT = 0.99  # share of the pass keys that must be found


class Shards(Mask):
    """Head h sees every ``stride[h]``-th block of ``size`` tokens: those with ``(block + shift[h]) % stride[h] == 0``.

    Args:
        size: tokens of a block.
        stride, shift: int ``[H]``.

    Raises:
        SpecError: a size or stride below 1.
    """

    stride: Tensor
    shift: Tensor

    def __init__(self, size: int, stride: Tensor, shift: Tensor):
        super().__init__()
        if size < 1 or int(stride.min()) < 1:
            raise SpecError(f"Shards needs a size and strides of at least 1; got {size} and {stride.tolist()}")
        self.size = size
        self.hold("stride", stride)
        self.hold("shift", shift)

    def visible(self, at: At) -> Tensor:
        return (at.k // self.size + self.shift[at.h]) % self.stride[at.h] == 0

    def blocks(self, span: Span) -> Tensor:
        stride, shift = self.stride[:, None, None], self.shift[:, None, None]
        lo, hi = span.k_lo // self.size + shift, span.k_hi // self.size + shift
        some = hi // stride * stride >= lo
        return codes(~some, some & ((lo == hi) | (stride == 1))).expand(-1, len(span.q_lo), -1)


class S2(System):
    """Settings, in blocks of ``block`` tokens: ``local``, the window; ``stride``; ``shift`` of head 0.

    ``dense_heads``, the last so many, see everything; ``kv_heads``: how many shards there are (``None``: one a head).
    """

    slug = "s2"
    title = "S2-Attention (sparsely sharded)"
    paper = "https://arxiv.org/abs/2407.17678"
    code = "https://github.com/linxihui/dkernel"
    promises = Promises(unit_rows=True)

    def __init__(
        self, block: int = 64, local: int = 4, stride: int = 4, shift: int = 0, dense_heads: int = 0,
        kv_heads: int | None = None,
    ):  # fmt: skip
        self.block, self.local, self.stride, self.shift = block, local, stride, shift
        self.dense_heads, self.kv_heads = dense_heads, kv_heads

    def shards(self, heads: int) -> tuple[Tensor, Tensor]:
        """Stride and shift of every head, int ``[heads]``; a dense head's stride is 1.

        Raises:
            SpecError: more dense heads than there are, or heads that do not divide among ``kv_heads``.
        """
        groups = self.kv_heads or heads
        if heads % groups or not 0 <= self.dense_heads <= groups:
            raise SpecError(f"S2: {heads} heads do not fit kv_heads={self.kv_heads}, dense_heads={self.dense_heads}")
        head = torch.arange(groups).repeat_interleave(heads // groups)
        stride = torch.where(head < groups - self.dense_heads, self.stride, 1)
        return stride, head * max(1, self.stride // heads) + self.shift

    def complete(self, heads: int) -> bool:
        """Is every block in the shard of some head?"""
        stride, shift = self.shards(heads)
        return bool((stride == 1).any()) or len({*(shift % self.stride).tolist()}) == self.stride

    def build(self, heads: int) -> Attention:
        """The window and the shards, causal. Raises SpecError for sizes below 1."""
        seen = NearBlocks(self.block, self.local) | Shards(self.block, *self.shards(heads))
        return Attention(mask=masks.Causal() & seen)

    def claim(self) -> ClaimNumbers:
        """Union of 8 shards, density and speed at 8192 tokens; a layer taught pass keys with 4 shards and with 1."""
        from ...study import passkeys
        from ...study.claims import interleaved

        n, heads, sharded = 8192, 8, S2(stride=8)
        spec, dense = sharded.build(heads), Attention(mask=masks.Causal())
        whole = At.everywhere(1, heads, n, n, 0, False, torch.device("cpu"))
        some = whole.moved(whole.q[:, :, ::61], whole.k)
        seen, past = spec.mask.visible(some)[0], dense.mask.visible(some)[0, 0]
        density = float(seen.sum() / past.sum() / heads)
        q, k, v = torch.randn(3, 1, heads, n, 64, generator=torch.Generator().manual_seed(0)).unbind(0)
        run = partial(attention, q, k, v)
        speedup = interleaved({"s2": partial(run, spec), "dense": partial(run, dense)}, 5).ratio("dense", "s2")
        ours = S2(block=4, local=2)
        one = NearBlocks(4, 2) | Shards(4, torch.full((4,), 4), torch.zeros(4, dtype=torch.long))
        programs = {"sharded": ours.build(4), "one shard": Attention(mask=masks.Causal() & one)}
        right = {name: float(passkeys.found(passkeys.teach(p, 4, layers=1))[0].mean()) for name, p in programs.items()}
        return ClaimNumbers.decide(
            {
                "density": round(density, 4), "inverse_density": round(1 / density, 3), "speedup": round(speedup, 3),
                "passkeys": round(right["sharded"], 3), "passkeys_one_shard": round(right["one shard"], 3),
            },
            f"Eight heads of stride 8 together see the whole past of 8192 tokens. They see {density:.1%} of it each and"
            f" run at {speedup:.2f} times the speed of dense attention ({1 / density:.2f} is the inverse density). One"
            f" layer of four heads finds {right['sharded']:.0%} of the pass keys it was taught to find,"
            f" {right['one shard']:.0%} where all heads see the same shard.",
            union_complete=sharded.complete(heads) and torch.equal(seen.any(0), past),
            speed_near_inverse_density=speedup * NEAR * density >= 1,
            pass_keys_found=right["sharded"] >= PERFECT,
        )  # fmt: skip
