"""The algebra of decay within and across chunks, for none, one per token and channel, and one per token.

Tensors are chunked: ``[G, chunks, C, F]``. Every factor is at most 1: a form that divides by a decay (``k exp(-G)``)
overflows as soon as the decay is strong. And a float32 sum of log-decays loses a weak one beside a strong one, so sums
that are subtracted are float64 (per token), or nothing is subtracted (per channel, where float64 would cost too much).
"""

from __future__ import annotations

from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

GONE = -1000.0  # a log-decay whose exp is 0 in every dtype, while float64 sums of it keep the weak ones


class NoDecay:
    """Nothing is forgotten."""

    def scores(self, a: Tensor, b: Tensor, diagonal: int = 0) -> Tensor:
        """``a[t] . b[s]``, decayed from s to t, for s <= t (``diagonal=-1``: s < t), else 0: ``[G, chunks, C, C]``."""
        return (a @ b.mT).tril(diagonal)

    def since_start(self, a: Tensor) -> Tensor:
        """``a[t]`` times the decay from the chunk's start to t, t included."""
        return a

    def until_end(self, b: Tensor) -> Tensor:
        """``b[s]`` times the decay after s to the chunk's end."""
        return b

    def carry(self, state: Tensor, chunk: int) -> Tensor:
        """A state ``[G, F, Dv]`` from before a chunk to after it."""
        return state

    def across(self, written: Tensor) -> Tensor:
        """States before each chunk and after the last, ``[G, 1 + chunks, F, Dv]``, from the state that came in and
        what each chunk writes, ``[G, 1 + chunks, F, Dv]``."""
        count = written.shape[1]
        return (written.new_ones(count, count).tril() @ written.flatten(2)).view_as(written)


class ChannelDecay(NoDecay):
    """One log-decay per token and channel, ``[G, chunks, C, F]``.

    A chunk is halved again and again. Where two halves meet, the later one's queries carry the decay since the cut and
    the earlier one's keys the decay until it. What a whole chunk keeps comes from the sum of its log-decays: a weak
    decay rounded at every token would be another decay after a million.
    """

    def __init__(self, log: Tensor):
        self.log = log
        self.size = log.shape[-2]
        full = 1 << (self.size - 1).bit_length()
        since = F.pad(log.exp(), (0, 0, 0, full - self.size), value=1.0)  # within blocks of one token
        until = torch.ones_like(since)
        self.cuts: list[tuple[Tensor, Tensor]] = []  # for h = 1, 2, 4...: decay since the cut, decay until it
        half = 1
        while half < full:
            since, until = (x.unflatten(-2, (-1, 2, half)) for x in (since, until))
            self.cuts.append((since[..., 1, :, :], until[..., 0, :, :]))
            first, second = since[..., -1:, :].split(1, -3)
            since = (since * torch.cat([torch.ones_like(first), first], -3)).flatten(-4, -2)
            until = (until * torch.cat([second, torch.ones_like(second)], -3)).flatten(-4, -2)
            half *= 2
        self.since, self.until = since[..., : self.size, :], until[..., : self.size, :]

    def scores(self, a: Tensor, b: Tensor, diagonal: int = 0) -> Tensor:
        full = 1 << len(self.cuts)
        if full > self.size:
            a, b = (F.pad(x, (0, 0, 0, full - self.size)) for x in (a, b))
        found = a.new_zeros(*a.shape[:-1], full)
        if not diagonal:
            found.diagonal(dim1=-2, dim2=-1).copy_((a * b).sum(-1))
        half = 1
        for since, until in self.cuts:
            late = a.unflatten(-2, (-1, 2, half))[..., 1, :, :] * since
            early = b.unflatten(-2, (-1, 2, half))[..., 0, :, :] * until
            blocks = found.unflatten(-1, (-1, 2, half))[..., 0, :].unflatten(-3, (-1, 2, half))[..., 1, :, :, :]
            blocks.diagonal(dim1=-4, dim2=-2).copy_((late @ early.mT).movedim(-3, -1))
            half *= 2
        return found[..., : self.size, : self.size]

    def since_start(self, a: Tensor) -> Tensor:
        return a * self.since

    def until_end(self, b: Tensor) -> Tensor:
        return b * self.until

    @cached_property
    def whole(self) -> Tensor:
        """What a chunk keeps of each channel, ``[G, chunks, F, 1]``."""
        return self.log.sum(-2).exp()[..., None]

    def carry(self, state: Tensor, chunk: int) -> Tensor:
        return state * self.whole[:, chunk]

    def across(self, written: Tensor) -> Tensor:
        states = [written[:, 0]]
        for chunk in range(written.shape[1] - 1):
            states.append(torch.addcmul(written[:, chunk + 1], states[-1], self.whole[:, chunk]))
        return torch.stack(states, 1)


class ScalarDecay(NoDecay):
    """One log-decay per token, ``[G, chunks, C]``, or ``[G, 1, C]`` where all chunks have the same."""

    def __init__(self, log: Tensor, dtype: torch.dtype):
        self.sums = log.double().clamp(min=GONE).cumsum(-1)  # float64: see above
        self.dtype = dtype

    def between(self, sums: Tensor) -> Tensor:
        """``exp(sums[t] - sums[s])`` for s <= t, else 0."""
        size = sums.shape[-1]
        later = torch.ones(size, size, dtype=torch.bool, device=sums.device).triu(1)
        difference = (sums[..., :, None] - sums[..., None, :]).to(self.dtype)
        return difference.masked_fill_(later, -torch.inf).exp_()

    @cached_property
    def matrix(self) -> Tensor:
        """The decay from s to t, 0 for s > t: ``[G, chunks, C, C]``."""
        return self.between(self.sums)

    def scores(self, a: Tensor, b: Tensor, diagonal: int = 0) -> Tensor:
        product = (a @ b.mT) * self.matrix
        return product.tril(diagonal) if diagonal else product

    def since_start(self, a: Tensor) -> Tensor:
        return a * self.sums.to(self.dtype).exp()[..., None]

    def until_end(self, b: Tensor) -> Tensor:
        return b * (self.sums[..., -1:] - self.sums).to(self.dtype).exp()[..., None]

    @cached_property
    def whole(self) -> Tensor:
        """What a chunk keeps, ``[G, chunks, 1, 1]``."""
        return self.sums[..., -1, None, None].to(self.dtype).exp()

    def carry(self, state: Tensor, chunk: int) -> Tensor:
        return state * self.whole[:, chunk % self.whole.shape[1]]

    def across(self, written: Tensor) -> Tensor:
        totals = self.sums[..., -1].expand(-1, written.shape[1] - 1).cumsum(-1)
        return (self.between(F.pad(totals, (1, 0))) @ written.flatten(2)).view_as(written)
