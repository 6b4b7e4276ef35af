"""Ranks in a ring: how a sequence is split among them, and tensors that go from rank to rank while they compute."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import SpecError


@dataclass(frozen=True)
class Chunk:
    """Positions ``start`` to ``stop`` of a sequence; in the tensor of their rank they begin at ``own``."""

    start: int
    stop: int
    own: int

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def here(self) -> slice:
        """Where they lie in the rank's own tensor."""
        return slice(self.own, self.own + len(self))


def chunks(length: int, rank: int, size: int, zigzag: bool) -> list[Chunk]:
    """What one of ``size`` ranks holds of a sequence, in order and without empty ones.

    Zig-zag: the sequence is cut in twice as many parts as there are ranks, and rank r holds the parts r and, from the
    end, r: under a causal mask all ranks then see equally many keys. Without: each rank holds one part. Parts differ by
    one position at most, the first ones being the longer.
    """
    count = 2 * size if zigzag else size
    each, longer = divmod(length, count)
    found: list[Chunk] = []
    for part in (rank, count - 1 - rank) if zigzag else (rank,):
        start = part * each + min(part, longer)
        stop = start + each + (part < longer)
        if found and found[-1].stop == start:  # the last rank's two parts are neighbours
            found[-1] = Chunk(found[-1].start, stop, 0)
        elif stop > start:
            found.append(Chunk(start, stop, sum(map(len, found))))
    return found


class Exchange:
    """Tensors on their way to the next rank, and those that come from the one before."""

    def __init__(self, sent: Sequence[Tensor], arriving: list[Tensor], works: Sequence[Any]):
        self.sent, self.arriving, self.works = sent, arriving, works

    def wait(self) -> list[Tensor]:
        """What came, once; what was sent is let go."""
        for work in self.works:
            work.wait()
        arrived, self.arriving, self.sent = self.arriving, [], ()
        return arrived


class Ring:
    """The ranks of a process group, each with a next one.

    Args:
        group: a process group; the default one if not given.
    """

    def __init__(self, group: dist.ProcessGroup | None = None):
        if not dist.is_available() or not dist.is_initialized():
            raise SpecError(
                "torch.distributed has no process group: call torch.distributed.init_process_group first, in every"
                " process (torchrun starts them)"
            )
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise SpecError("this process does not belong to the group: only its members may call")

    def lengths(self, length: int, zigzag: bool) -> list[int]:
        """How much of a sequence each rank holds."""
        return [sum(map(len, chunks(length, rank, self.size, zigzag))) for rank in range(self.size)]

    def tell(self, thing: Any) -> list[Any]:
        """What every rank told, in the order of the ranks."""
        found: list[Any] = [None] * self.size
        if self.size == 1:
            return [thing]
        dist.all_gather_object(found, thing, group=self.group)
        return found

    def reduce(self, tensor: Tensor, how: Any = dist.ReduceOp.SUM) -> Tensor:
        """The sum over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor, how, group=self.group)
        return tensor

    def exchange(self, tensors: Sequence[Tensor], length: int, tag: int) -> Exchange:
        """Begin to pass tensors ``[B, H, m, ...]`` on, and to take in such of another ``length``."""
        if self.size == 1:
            return Exchange(tensors, list(tensors), ())
        sent = [x.contiguous() for x in tensors]
        arriving = [x.new_empty(*x.shape[:2], length, *x.shape[3:]) for x in sent]
        after, before = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        # One batch, so that a backend which runs such operations one by one does not wait for itself.
        batch = []
        for i, (mine, new) in enumerate(zip(sent, arriving, strict=True)):
            batch.append(dist.P2POp(dist.isend, mine, group=self.group, tag=tag + i, group_peer=after))
            batch.append(dist.P2POp(dist.irecv, new, group=self.group, tag=tag + i, group_peer=before))
        return Exchange(sent, arriving, dist.batch_isend_irecv(batch))

    def owner(self, step: int) -> int:
        """Whose tensors are here at a step."""
        return (self.rank - step) % self.size

    def visits(self, tensors: Sequence[Tensor], lengths: Sequence[int]) -> Iterator[tuple[int, list[Tensor]]]:
        """Every rank and its tensors ``[B, H, m, ...]``, the own first; the next come while these are worked on.

        The list is always the same one: who keeps no tensor of it lets them go.
        """
        here = list(tensors)
        for step in range(self.size):
            coming = None
            if step + 1 < self.size:
                coming = self.exchange(here, lengths[self.owner(step + 1)], tag=0)
            yield self.owner(step), here
            if coming is not None:
                here[:] = coming.wait()


class Sums:
    """Sums that travel with the keys that :meth:`Ring.visits` brings: each rank adds its share, the owner gets all."""

    def __init__(self, ring: Ring, lengths: Sequence[int]):
        self.ring, self.lengths = ring, lengths
        self.step = 0
        self.coming: Exchange | None = None

    def add(self, shares: list[Tensor]) -> None:
        """Add this rank's shares ``[B, H, m, ...]`` for the keys that are here (they are overwritten), and pass on."""
        if self.coming is not None:
            self._take_in(shares, self.coming.wait())
        self.step += 1
        self.coming = self.ring.exchange(shares, self.lengths[self.ring.owner(self.step)], tag=8)

    @staticmethod
    def _take_in(shares: list[Tensor], others: list[Tensor]) -> None:
        for mine, more in zip(shares, others, strict=True):
            mine += more

    def home(self) -> list[Tensor]:
        """The sums of the own keys, after every visit."""
        assert self.coming is not None and self.step == self.ring.size
        return self.coming.wait()


def join(shards: Sequence[Tensor], length: int, dim: int, zigzag: bool) -> Tensor:
    """The whole of what the ranks hold."""
    placed = [
        (chunk.start, shard.narrow(dim, chunk.own, len(chunk)))
        for rank, shard in enumerate(shards)
        for chunk in chunks(length, rank, len(shards), zigzag)
    ]
    return torch.cat([piece for _, piece in sorted(placed, key=lambda item: item[0])], dim)
