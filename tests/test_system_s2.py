"""S2-Attention against its pattern written out head by head, its union, and block classes that are never wrong."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade import SpecError, attention
from saccade.systems.sparse.s2 import S2, Shards
from test_masks import check_exact, check_never_wrong, visible

torch.set_num_threads(1)
LAWS = settings(max_examples=25, deadline=None, derandomize=True)
SIZES = [st.integers(a, z) for a, z in ((1, 60), (0, 20), (1, 7), (1, 17), (1, 17))]


def pattern(n, heads, block, local, stride, shift=0, dense=0, per_shard=1):
    """Each head's shard as the set of its blocks."""
    step = 1 if heads >= stride else stride // heads
    count = -(-n // block)
    seen = torch.zeros(heads, n, n, dtype=torch.bool)
    for head in range(heads):
        group = head // per_shard
        mine = {b for b in range(count) if (b + group * step + shift) % stride == 0}
        if group >= heads // per_shard - dense:
            mine = set(range(count))
        for q in range(n):
            near = {q // block - i for i in range(local)}
            for k in range(q + 1):
                seen[head, q, k] = k // block in mine | near
    return seen


@pytest.mark.parametrize(
    "options",
    [
        {"block": 3, "local": 2, "stride": 4},
        {"block": 2, "local": 1, "stride": 10, "shift": 3},
        {"block": 4, "local": 1, "stride": 3, "dense": 1},
        {"block": 1, "local": 3, "stride": 2, "per_shard": 2, "dense": 1},
    ],
)
def test_the_mask_is_the_pattern(options):
    n, heads = 45, 4
    given_ = {k: v for k, v in options.items() if k not in ("dense", "per_shard")}
    kv = heads // options.get("per_shard", 1)
    mask = S2(**given_, dense_heads=options.get("dense", 0), kv_heads=kv).build(heads).mask
    truth = pattern(n, heads, **options)
    assert torch.equal(visible(mask, 1, heads, n, n)[0], truth)
    assert torch.equal(visible(mask, 1, heads, 4, n)[0], truth[:, -4:])


@LAWS
@given(*SIZES, st.lists(st.integers(1, 6), min_size=3, max_size=3), st.lists(st.integers(0, 9), min_size=3, max_size=3))
def test_blocks_are_exact_for_the_shards_and_never_wrong_for_all(n, more, size, rows, columns, stride, shift):
    mask = Shards(size, torch.tensor(stride), torch.tensor(shift))
    check_exact(mask, 1, 3, n, n + more, rows, columns)
    whole = S2(size, 1 + shift[0] % 3, stride[0], shift[1], stride[1] % 4).build(3).mask
    check_never_wrong(whole, 1, 3, n, n + more, rows, columns)


@pytest.mark.parametrize(("heads", "stride"), [(4, 4), (8, 3), (4, 7), (2, 4), (3, 8)])
def test_complete_says_whether_the_union_is_the_past(heads, stride):
    system = S2(block=2, local=1, stride=stride)
    union = visible(system.build(heads).mask, 1, heads, 64, 64)[0].any(0)
    assert system.complete(heads) == bool((union | ~torch.ones(64, 64).tril().bool()).all())
    assert system.complete(heads) == (heads >= stride)
    assert S2(stride=stride, dense_heads=1).complete(heads)
    assert not S2(stride=4, kv_heads=2).complete(8)  # two shards


def test_tiles_equal_dense_softmax_and_decoding_equals_prefill():
    spec = S2(8, 2, 4).build(4)
    q, k, v = torch.randn(3, 1, 4, 600, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind(0)
    i, j = torch.arange(600)[:, None] // 8, torch.arange(600)[None] // 8
    shard = torch.stack([(j + head) % 4 == 0 for head in range(4)])
    seen = (shard | (i - j < 2)) & torch.ones(600, 600).tril().bool()
    dense = (q @ k.mT / 4).masked_fill(~seen, -torch.inf).softmax(-1) @ v
    assert (attention(q, k, v, spec, backend="band") - dense).abs().max() < 1e-12
    step = attention(q[:, :, 500:501], k[:, :, :501], v[:, :, :501], spec, offset=500)
    assert (step - dense[:, :, 500:501]).abs().max() < 1e-12


@pytest.mark.parametrize("options", [{"block": 0}, {"stride": 0}, {"local": 0}, {"kv_heads": 3}, {"dense_heads": 5}])
def test_errors(options):
    with pytest.raises(SpecError, match=r"at least 1|do not fit"):
        S2(**options).build(4)
