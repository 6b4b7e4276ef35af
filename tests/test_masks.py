"""Masks: what each sees, against formulas of its own, and block classes that are never wrong."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade import At, SpecError, block_map, masks
from saccade.core.masks import EMPTY, FULL, PARTIAL, Mask, Span, as_mask
from saccade.hosts.views import Placed
from saccade.study.measure import peak_bytes

LAWS = settings(max_examples=60, deadline=None, derandomize=True)


def visible(mask: Mask, b: int, h: int, n: int, m: int, offset: int | None = None) -> torch.Tensor:
    at = At.everywhere(b, h, n, m, m - n if offset is None else offset, False, torch.device("cpu"))
    return mask.visible(at).expand(b, h, n, m)


def codes(mask: Mask, b: int, h: int, n: int, m: int, rows: int, columns: int) -> torch.Tensor:
    found = mask.blocks(Span.grid(n, m, rows, columns, batch=b, heads=h))
    return found[(None,) * (4 - found.ndim)].expand(b, h, -(-n // rows), -(-m // columns))


def check_never_wrong(mask: Mask, b: int, h: int, n: int, m: int, rows: int, columns: int) -> None:
    seen, said = visible(mask, b, h, n, m), codes(mask, b, h, n, m, rows, columns)
    for i, j in itertools.product(range(said.shape[2]), range(said.shape[3])):
        block = seen[:, :, i * rows : (i + 1) * rows, j * columns : (j + 1) * columns].flatten(2)
        assert not (block.any(-1) & (said[:, :, i, j] == EMPTY)).any(), f"block {i}, {j} is not empty"
        assert not (~block.all(-1) & (said[:, :, i, j] == FULL)).any(), f"block {i}, {j} is not full"


def check_exact(mask: Mask, b: int, h: int, n: int, m: int, rows: int, columns: int) -> None:
    seen, said = visible(mask, b, h, n, m), codes(mask, b, h, n, m, rows, columns)
    for i, j in itertools.product(range(said.shape[2]), range(said.shape[3])):
        block = seen[:, :, i * rows : (i + 1) * rows, j * columns : (j + 1) * columns].flatten(2)
        truth = torch.where(block.all(-1), FULL, torch.where(block.any(-1), PARTIAL, EMPTY))
        assert torch.equal(truth, said[:, :, i, j].long()), f"block {i}, {j}: {said[:, :, i, j]}, is {truth}"


@st.composite
def primitives(draw, n: int, m: int):
    small = st.integers(1, 12)

    def bools(rows: int, columns: int) -> torch.Tensor:
        return torch.tensor(draw(st.lists(st.booleans(), min_size=rows * columns, max_size=rows * columns))).view(
            rows, -1
        )

    kinds = {
        "full": lambda: masks.Full(),
        "causal": lambda: masks.Causal(),
        "window": lambda: masks.Window(draw(small), draw(st.none() | small)),
        "dilated": lambda: masks.Dilated(draw(small), draw(small)),
        "sinks": lambda: masks.Sinks(draw(st.integers(0, 12))),
        "prefix": lambda: masks.Prefix(torch.tensor([draw(st.integers(0, m)) for _ in range(2)])),
        "padding": lambda: masks.Padding(bools(2, m)),
        "documents": lambda: masks.Documents(
            torch.tensor(sorted(draw(st.lists(st.integers(-1, 3), min_size=m, max_size=m)))),
            torch.tensor(draw(st.lists(st.integers(-1, 3), min_size=n, max_size=n))),
        ),
        "tensor": lambda: as_mask(bools(n, m)),
        "function": lambda: as_mask(lambda b, h, q, k: (q + 2 * k + b) % 3 != h),
    }  # fmt: skip
    if n <= m:
        kinds["blocks"] = lambda: masks.Blocks(draw(small))
        layout = torch.tensor(draw(st.lists(st.booleans(), min_size=32, max_size=32))).view(2, 4, 4)
        kinds["layout"] = lambda: masks.Blocks(-(-m // 4), layout)
    return kinds[draw(st.sampled_from(sorted(kinds)))]()


@LAWS
@given(st.data(), st.integers(1, 40), st.integers(1, 40), st.integers(1, 17), st.integers(1, 17))
def test_blocks_are_never_wrong(data, n, m, rows, columns):
    mask = data.draw(primitives(n, m))
    for _ in range(data.draw(st.integers(0, 3))):
        other = data.draw(primitives(n, m))
        mask = data.draw(st.sampled_from([mask & other, mask | other, ~mask]))
    check_never_wrong(mask, 2, 2, n, m, rows, columns)


@LAWS
@given(st.data(), st.integers(1, 40), st.integers(0, 20), st.integers(1, 17), st.integers(1, 17))
def test_blocks_are_exact_where_a_closed_form_can_be(data, n, more, rows, columns):
    size = st.integers(1, 15)
    mask = data.draw(st.sampled_from([0, 1, 2, 3, 4]))
    m = n + more
    keep = torch.tensor(data.draw(st.lists(st.booleans(), min_size=2 * m, max_size=2 * m))).view(2, m)
    chosen = [
        masks.Causal(), masks.Window(data.draw(size), data.draw(size)), masks.Sinks(data.draw(size)),
        masks.Padding(keep), masks.Dilated(data.draw(size), data.draw(size)),
    ][mask]  # fmt: skip
    check_exact(chosen, 2, 1, n, m, rows, columns)


@LAWS
@given(st.data(), st.integers(1, 20), st.integers(1, 30), st.integers(1, 9), st.integers(1, 9))
def test_blocks_of_keys_that_lie_elsewhere_are_never_wrong(data, n, m, rows, columns):
    """A cache holds some tokens, in any order; queries are the last of those seen."""
    seen = 60
    places = st.lists(st.integers(-1, seen - 1), min_size=m, max_size=m)
    positions = torch.tensor([[data.draw(places) for _ in range(2)] for _ in range(2)])
    inner = data.draw(st.sampled_from([masks.Causal(), masks.Causal() & masks.Window(9), masks.Full()]))
    mask = Placed(inner, positions)
    at = At.everywhere(2, 4, n, m, seen - n, True, torch.device("cpu"))
    said = mask.blocks(Span.grid(n, m, rows, columns, offset=seen - n, batch=2, heads=4))
    truth = mask.visible(at).expand(2, 4, n, m)
    for i, j in itertools.product(range(said.shape[2]), range(said.shape[3])):
        block = truth[:, :, i * rows : (i + 1) * rows, j * columns : (j + 1) * columns].flatten(2)
        assert not (block.any(-1) & (said[:, :, i, j] == EMPTY)).any()
        assert not (~block.all(-1) & (said[:, :, i, j] == FULL)).any()
        if isinstance(inner, masks.Causal) and bool((positions >= 0).all()):
            assert torch.equal(said[:, :, i, j] == FULL, block.all(-1))


AXIS = st.tuples(st.integers(1, 9), st.integers(1, 4), st.integers(1, 4), st.booleans())


def natten(shape, kernel, dilation, causal) -> torch.Tensor:
    """NATTEN's rule, one query and axis at a time, in plain Python: the dilated neighbours, shifted in at a border."""

    def neighbours(i: int, length: int, width: int, gap: int, is_causal: bool) -> set[int]:
        group = list(range(i % gap, length, gap))
        place = group.index(i)
        if is_causal:
            return set(group[max(0, place - width + 1) : place + 1])
        start = min(max(place - width // 2, 0), len(group) - width)
        return set(group[start : start + width])

    axes = [
        [neighbours(i, *settings_) for i in range(settings_[0])]
        for settings_ in zip(shape, kernel, dilation, causal, strict=True)
    ]
    places = list(itertools.product(*(range(length) for length in shape)))
    near = [[all(c in axes[a][x] for a, (x, c) in enumerate(zip(p, o, strict=True))) for o in places] for p in places]
    return torch.tensor(near)


@LAWS
@given(st.lists(AXIS, min_size=1, max_size=3), st.integers(1, 20), st.integers(1, 20))
def test_neighborhood_equals_nattens_rule(axes, rows, columns):
    axes = [(max(length, width * gap), width, gap, causal) for length, width, gap, causal in axes]
    shape, kernel, dilation, causal = ([axis[i] for axis in axes] for i in range(4))
    size = int(torch.tensor(shape).prod())
    if size > 400:
        return
    mask = masks.Neighborhood(shape, kernel, dilation, causal)
    assert torch.equal(visible(mask, 1, 1, size, size)[0, 0], natten(shape, kernel, dilation, causal))
    check_never_wrong(mask, 1, 1, size, size, rows, columns)


def test_every_query_has_kernel_neighbours_without_causality():
    seen = visible(masks.Neighborhood((8, 9), (3, 4), (2, 1)), 1, 1, 72, 72)
    assert (seen.sum(-1) == 12).all()


def test_masks_say_what_their_names_say():
    n = 9
    i, j = torch.arange(n)[:, None], torch.arange(n)[None]
    ids = torch.tensor([0, 0, 0, 1, 1, 1, 1, -1, -1])
    for mask, truth in {
        masks.Causal(): j <= i,
        masks.Window(3): (i - j).abs() < 3,
        masks.Causal() & masks.Window(3): (j <= i) & (j > i - 3),
        masks.Window(3, 1): (j > i - 3) & (j <= i),
        masks.Dilated(2, 3): ((i - j) % 3 == 0) & ((i - j).abs() <= 3),
        masks.Sinks(2): j < 2,
        masks.Blocks(4): i // 4 == j // 4,
        masks.Causal() | masks.Prefix(4): (j <= i) | (j < 4),
        masks.Documents(ids): (ids[:, None] == ids) & (ids >= 0),
        masks.Documents.from_lengths([4, 5]): (i < 4) == (j < 4),
        ~masks.Causal(): j > i,
    }.items():
        assert torch.equal(visible(mask, 1, 1, n, n)[0, 0], truth.expand(n, n)), mask


def test_causal_is_bottom_right_aligned():
    whole = visible(masks.Causal(), 1, 1, 9, 9)
    assert torch.equal(visible(masks.Causal(), 1, 1, 3, 9), whole[:, :, 6:])


def test_a_block_map_costs_blocks():
    n, mask = 131072, masks.Causal() & (masks.Window(1024) | masks.Sinks(4))
    found = block_map(mask, n)
    assert found.codes.shape == (1024, 1024)
    row = found.codes[500].tolist()
    assert [j for j, code in enumerate(row) if code == FULL] == list(range(493, 500))
    assert [j for j, code in enumerate(row) if code == PARTIAL] == [0, 492, 500]
    assert peak_bytes(lambda: block_map(mask, n), torch.device("cpu")) < 50e6


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: masks.Window(0), "at least 1"),
        (lambda: masks.Dilated(2, 0), "dilation"),
        (lambda: masks.Neighborhood((4, 4), 5), "kernel x dilation"),
        (lambda: masks.Neighborhood((4, 4), (3, 3, 3)), "one per axis"),
        (lambda: masks.Padding(torch.ones(4)), r"\[B, M\]"),
        (lambda: as_mask(torch.zeros(3, 3)), "scores.Bias"),
        (lambda: as_mask(7), "int"),
        (lambda: visible(masks.Padding(torch.ones(1, 5)), 1, 1, 4, 4), "5 keys, the call has 4"),
        (lambda: visible(masks.Documents(torch.zeros(4)), 1, 1, 6, 4), "queries="),
        (lambda: visible(masks.Neighborhood(4, 3), 1, 1, 5, 5), "needs 4"),
        (lambda: visible(as_mask(torch.ones(3, 3) > 0), 1, 1, 4, 4), "does not broadcast"),
    ],
)
def test_errors_say_what_was_expected(make, says):
    with pytest.raises(SpecError, match=says):
        make()
