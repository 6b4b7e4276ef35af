"""What the systems that attend within blocks of a fixed size share: a cache that holds the block being filled."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...nn import KVCache


@dataclass
class BlockCache(KVCache):
    """Keys and values ``[B, Hkv, M, D]`` of the block that is not full yet, M < size: nothing else is seen again."""

    size: int = 1

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The held ones and these; held from now on is what follows the last full block."""
        k, v = super().append(k, v)
        left = k.shape[2] % self.size
        self.k, self.v = (x[:, :, x.shape[2] - left :] for x in (k, v))
        return k, v
