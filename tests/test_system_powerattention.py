"""PowerAttention against the paper's Algorithm 1 written out, its reach, and block classes that are never wrong."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade import SpecError, attention, masks
from saccade.systems.sparse.block_masks import NearBlocks
from saccade.systems.sparse.powerattention import PowerAttention, PowerBlocks, reach
from test_masks import check_exact, check_never_wrong, visible

torch.set_num_threads(1)
LAWS = settings(max_examples=25, deadline=None, derandomize=True)
SIZES = [st.integers(a, z) for a, z in ((1, 60), (0, 20), (1, 7), (1, 6), (1, 17), (1, 17))]


def algorithm1(m, block, window, rows):
    """The pattern, one query and key at a time, from powers that are listed."""
    powers = {2**i for i in range(20)}
    seen = [
        [
            k <= q and (q // block - k // block < window or q // block - k // block in powers | {0} or k < block)
            for k in range(m)
        ]
        for q in rows
    ]
    return torch.tensor(seen)


@pytest.mark.parametrize(("block", "window"), [(1, 1), (3, 2), (4, 5)])
def test_the_mask_is_algorithm_1(block, window):
    mask = PowerAttention(block, window).build(2).mask
    assert torch.equal(visible(mask, 1, 1, 77, 77)[0, 0], algorithm1(77, block, window, range(77)))
    assert torch.equal(visible(mask, 1, 1, 5, 77)[0, 0], algorithm1(77, block, window, range(72, 77)))


@LAWS
@given(
    st.integers(1, 60), st.integers(0, 20), st.integers(1, 7), st.integers(1, 6), st.integers(1, 17), st.integers(1, 17)
)
def test_blocks_are_exact(n, more, size, window, rows, columns):
    check_exact(PowerBlocks(size, window), 1, 1, n, n + more, rows, columns)
    check_never_wrong(PowerAttention(size, window).build(1).mask, 1, 1, n, n + more, rows, columns)


@LAWS
@given(
    st.integers(1, 60), st.integers(0, 20), st.integers(1, 7), st.integers(1, 6), st.integers(1, 17), st.integers(1, 17)
)
def test_near_blocks_are_exact_with_one_count_and_with_one_per_head(n, more, size, count, rows, columns):
    mask = NearBlocks(size, torch.tensor([count, 2, 40]))
    check_exact(mask, 1, 3, n, n + more, rows, columns)
    i, j = torch.arange(more, n + more)[:, None] // size, torch.arange(n + more)[None] // size
    assert torch.equal(visible(mask, 1, 3, n, n + more)[0, 0], j > i - count)
    check_exact(NearBlocks(size, count), 1, 1, n, n + more, rows, columns)


def test_d_layers_reach_two_to_the_d_blocks_and_not_one_less():
    n, block = 96, 3
    found = reach(masks.Causal() & PowerBlocks(block, 1), n, 5)
    for d, (q, k) in itertools.product(range(1, 6), [(95, 0), (95, 2), (94, 10), (50, 3), (95, 50), (63, 1)]):
        hops = bin(q // block - k // block).count("1")
        assert bool(found[d - 1, q, k]) == (hops <= d), (d, q, k)
    window = reach(masks.Causal() & NearBlocks(block, 6), n, 3)
    assert [int(seen[-1].sum()) for seen in window] == [6 * block, 11 * block, 16 * block]


def test_tiles_equal_dense_softmax_and_decoding_equals_prefill():
    spec = PowerAttention(8, 2).build(4)
    q, k, v = torch.randn(3, 1, 4, 700, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind(0)
    score = (q @ k.mT / 4).masked_fill(~algorithm1(700, 8, 2, range(700)), -torch.inf)
    dense = score.softmax(-1) @ v
    assert (attention(q, k, v, spec, backend="band") - dense).abs().max() < 1e-12
    step = attention(q[:, :, 600:601], k[:, :, :601], v[:, :, :601], spec, offset=600)
    assert (step - dense[:, :, 600:601]).abs().max() < 1e-12


@pytest.mark.parametrize(
    "make", [lambda: PowerAttention(0).build(1), lambda: PowerAttention(4, 0).build(1), lambda: NearBlocks(4, 0)]
)
def test_errors(make):
    with pytest.raises(SpecError, match="at least 1"):
        make()
