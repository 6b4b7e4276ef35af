"""Keys and values in 8 or 4 bits: each token of each head has its own range."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Packed:
    """A tensor ``[..., D]`` as codes (uint8; two to a byte at 4 bits) between ``low`` and ``low + step * top``."""

    codes: Tensor
    low: Tensor
    step: Tensor
    bits: int

    @staticmethod
    def pack(x: Tensor, bits: int) -> Packed:
        """Round to ``2 ** bits`` even steps between the least and the greatest of each ``[D]`` (D even, at 4 bits)."""
        low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        step = ((high - low) / (2**bits - 1)).clamp(min=torch.finfo(x.dtype).tiny)
        codes = ((x - low) / step).round_().to(torch.uint8)
        if bits == 4:
            codes = codes[..., ::2] | codes[..., 1::2] << 4
        return Packed(codes, low, step, bits)

    def unpack(self) -> Tensor:
        """The tensor again, each number at most half a step away."""
        codes = self.codes
        if self.bits == 4:
            codes = torch.stack([codes & 15, codes >> 4], -1).flatten(-2)
        return codes.to(self.low.dtype).mul_(self.step).add_(self.low)

    def each(self, change: Callable[[Tensor], Tensor]) -> Packed:
        """Apply a change that leaves the last dimension alone."""
        return Packed(change(self.codes), change(self.low), change(self.step), self.bits)

    def then(self, other: Packed) -> Packed:
        """Both, one after the other along the tokens ``[..., M, D]``."""
        codes = torch.cat([self.codes, other.codes], -2)
        low, step = torch.cat([self.low, other.low], -2), torch.cat([self.step, other.step], -2)
        return Packed(codes, low, step, self.bits)

    @property
    def shape(self) -> Sequence[int]:
        """Of the unpacked tensor."""
        return (*self.low.shape[:-1], self.codes.shape[-1] * 8 // self.bits)

    @property
    def nbytes(self) -> int:
        """Of codes and ranges."""
        return self.codes.nbytes + self.low.nbytes + self.step.nbytes
