"""HiP attention against the tree search written out block by block."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from saccade.core.attend import attention, explain
from saccade.core.errors import SpecError
from saccade.core.masks import Causal, Span
from saccade.systems.sparse.hip import HiP


def draw(n: int, heads: int = 2, kv: int = 1) -> list[Tensor]:
    source = torch.Generator().manual_seed(n)
    return [torch.randn(1, h, n, 8, generator=source, dtype=torch.float64) for h in (heads, kv, kv)]


def searched(q: Tensor, k: Tensor, keep: int, columns: int, window: int) -> set[int]:
    """Blocks of ``k`` ``[M, D]`` found for a query block ``[rows, D]`` that ends where k ends."""
    nodes, blocks = keep // columns, -(-(len(k) - window) // columns)
    if len(k) - window <= keep:
        return set(range(max(0, blocks)))
    tree = [(blocks * i // nodes, blocks * (i + 1) // nodes) for i in range(nodes)]
    while any(z - a > 1 for a, z in tree):
        halves = [half for a, z in tree for half in ((a, a + (z - a) // 2), (a + (z - a) // 2, z)) if half[0] < half[1]]
        best = {a: float((q[1::2] @ k[a * columns : (a + 1) * columns].T).max()) for a, _ in halves}
        tree = sorted(halves, key=lambda half: -best[half[0]])[:nodes]
    return {a for a, _ in tree}


@pytest.mark.parametrize(("keep", "rows", "columns", "window"), [(32, 16, 2, 32), (48, 8, 4, 64), (16, 32, 1, 0)])
def test_search(keep: int, rows: int, columns: int, window: int) -> None:
    n = 416
    q, k, _ = draw(n)
    codes = Causal().blocks(Span.grid(n, n, rows, columns))[None, None]
    found = HiP(keep, rows, columns, window).build(2).select.choose(q, k, codes)
    for h in range(2):
        for b in range(n // rows):
            end = (b + 1) * rows
            newest = (end - 1) // columns
            wanted = searched(q[0, h, b * rows : end], k[0, 0, :end], keep, columns, window)
            wanted |= set(range(max(0, newest - (window + rows) // columns), newest + 1))
            mine = [x for x in found.blocks[0, h, b].tolist() if x >= 0]
            assert sorted(mine) == sorted(wanted)


def test_attends_to_what_it_found() -> None:
    q, k, v = draw(300)
    spec = HiP(32, 16, 2, 32).build(2)
    codes = Causal().blocks(Span.grid(300, 300, 16, 2))[None, None]
    seen = spec.select.choose(q, k, codes).dense(300, 300) & torch.ones(300, 300, dtype=torch.bool).tril()
    scores = (q @ k.mT / math.sqrt(8)).masked_fill(~seen, -math.inf)
    wanted = scores.softmax(-1) @ v
    for backend in ("band", "reference"):
        torch.testing.assert_close(attention(q, k, v, spec, backend=backend), wanted, rtol=0, atol=1e-12)
    assert explain(spec, q, k).visited < 0.35


def test_a_short_sequence_is_dense() -> None:
    q, k, v = draw(150)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(attention(q, k, v, HiP(128, 16, 2, 22).build(2)), dense, rtol=0, atol=1e-12)


def test_a_query_that_chooses_alone_decodes_and_is_causal() -> None:
    q, k, v = draw(200)
    system = HiP(16, 1, 2, 8)
    assert system.promised().causal and system.promised().decodes and not HiP().promised().causal
    spec = system.build(2)
    whole = attention(q, k, v, spec)
    for at in (0, 30, 137, 199):
        step = attention(q[:, :, at : at + 1], k[:, :, : at + 1], v[:, :, : at + 1], spec)
        roomy = attention(q[:, :, at : at + 1], k, v, spec, offset=at)
        for out in (step, roomy):
            torch.testing.assert_close(out[:, :, 0], whole[:, :, at], rtol=0, atol=1e-12)


def test_a_planted_key_is_found_at_every_depth_of_a_smooth_sequence() -> None:
    """Keys near the one looked for score high too, which is what the search lives on."""
    n = 1024
    for place in (100, 400, 700):
        q = torch.zeros(1, 1, n, 8, dtype=torch.float64)
        q[..., 0] = 1
        k = torch.zeros_like(q)
        k[0, 0, :, 0] = -(torch.arange(n) - place).abs().double()
        found = HiP(32, 32, 2, 32).build(1).select.choose(q, k, Causal().blocks(Span.grid(n, n, 32, 2))[None, None])
        assert place // 2 in found.blocks[0, 0, -1].tolist()


def test_refuses_halves_of_blocks() -> None:
    with pytest.raises(SpecError, match="multiples"):
        HiP(keep=33).build(1)
