"""Layers and normalizers beside packages that do the same, in the same run.

Peers, from a folder of packages (pip install --target DIR --no-deps entmax x-transformers rotary-embedding-torch einops
einx torch-einops-utils loguru frozendict sympy): entmax's functions between two products, x-transformers' Attention,
which carries the same weights as our MultiHead, and rotary-embedding-torch. 1024 and 2048 tokens, 8 heads of 64,
float32; forward and backward, but for the rotation. Both take turns in every round; medians are shown, and how far the
results are apart.
Usage: layers.py --peers DIR [--rounds N]
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import saccade
from linear import keep_freed_memory, seconds
from saccade import Attention, masks, normalizers
from saccade.nn import MultiHead, positions

HEADS, WIDTH, LENGTHS = 8, 64, (1024, 2048)


@dataclass
class Pair:
    """The same by us and by a peer, of the same inputs; ``order``: of ours that is the peer's."""

    what: str
    ours: Callable[..., Tensor]
    theirs: Callable[..., Tensor]
    given: list[Tensor]
    order: Tensor | None = None

    def difference(self) -> float:
        ours = self.ours(*self.given)
        ours = ours if self.order is None else ours[..., self.order]
        return float((ours - self.theirs(*self.given)).detach().abs().max())

    def run(self, call: Callable[..., Tensor]) -> None:
        out, leaves = call(*self.given), [x for x in self.given if x.requires_grad]
        if leaves:
            torch.autograd.grad(out.sum(), leaves)


def with_entmax(n: int) -> Iterator[Pair]:
    """Attention to all keys, with weights by the package ``entmax`` and two products."""
    import entmax

    given = [torch.randn(1, HEADS, n, WIDTH, requires_grad=True) for _ in range(3)]
    for name, ours, peer in (
        ("sparsemax", normalizers.Sparsemax(), entmax.sparsemax),
        ("entmax 1.5", normalizers.Entmax(1.5), entmax.entmax15),
        ("entmax 1.3", normalizers.Entmax(1.3), lambda scores, dim: entmax.entmax_bisect(scores, 1.3, dim=dim)),
    ):
        spec = Attention(normalizer=ours)
        yield Pair(
            f"entmax: {name}",
            lambda q, k, v, spec=spec: saccade.attention(q, k, v, spec),
            lambda q, k, v, peer=peer: peer(q @ k.mT * WIDTH**-0.5, dim=-1) @ v,
            given,
        )


def with_x_transformers(n: int) -> Iterator[Pair]:
    """Causal layers with two key heads for eight query heads."""
    from x_transformers.x_transformers import Attention as Peer

    x = torch.randn(1, n, HEADS * WIDTH, requires_grad=True)
    heads = torch.arange(HEADS).view(-1, 2).T.flatten()  # neighbours share a key head here, every second one there
    for name, normalizer, options in (
        ("softmax (both SDPA)", None, {"flash": True}),
        ("sigmoid", normalizers.Sigmoid(0.0), {"sigmoid": True}),
        ("signed (Cog)", normalizers.Signed(), {"cog_signed": True}),
        ("64 greatest", normalizers.TopKSoftmax(64), {"sparse_topk": 64}),
    ):
        spec = Attention(mask=masks.Causal(), normalizer=normalizer or normalizers.Softmax())
        ours = MultiHead(spec, HEADS * WIDTH, HEADS, kv_heads=2)
        peer = Peer(HEADS * WIDTH, dim_head=WIDTH, heads=HEADS, kv_heads=2, causal=True, **options)
        ours.q.weight.data.copy_(peer.to_q.weight.unflatten(0, (HEADS, WIDTH))[heads].flatten(0, 1))
        ours.out.weight.data.copy_(peer.to_out.weight.unflatten(1, (HEADS, WIDTH))[:, heads].flatten(1))
        for mine, theirs in ((ours.k, peer.to_k), (ours.v, peer.to_v)):
            mine.weight.data.copy_(theirs.weight)
        yield Pair(f"x-transformers: {name}", ours, lambda x, peer=peer: peer(x), [x])


def with_rotary(n: int) -> Iterator[Pair]:
    """Rotation of neighbouring pairs there, of halves here: the same but for the order of a head's channels."""
    from rotary_embedding_torch import RotaryEmbedding

    theirs, order = RotaryEmbedding(WIDTH), torch.arange(WIDTH).view(2, -1).T.flatten()
    q = torch.randn(1, HEADS, n, WIDTH)
    paired = q[..., order].contiguous()
    yield Pair("rotary-embedding-torch", positions.rotate, lambda q: theirs.rotate_queries_or_keys(paired), [q], order)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", type=Path, required=True, help="a folder of packages to compare with")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    sys.path.append(str(options.peers))
    keep_freed_memory()
    titles = ("peer", "tokens", "ms", "peer's ms", "ratio", "difference")
    table = Table(*titles, title=f"{torch.get_num_threads()} threads")
    for group, n in itertools.product((with_entmax, with_x_transformers, with_rotary), LENGTHS):
        torch.manual_seed(0)
        for pair in group(n):
            calls = {name: (partial(pair.run, call), 1) for name, call in (("our", pair.ours), ("peer", pair.theirs))}
            found = seconds(calls, options.rounds)
            ours, peers = found["our"], found["peer"]
            table.add_row(
                pair.what, str(n), f"{ours * 1e3:.1f}", f"{peers * 1e3:.1f}", f"{ours / peers:.2f}",
                f"{pair.difference():.0e}",
            )  # fmt: skip
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
