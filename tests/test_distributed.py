"""Attention across real processes equals the single process: results, statistics, every gradient, memory, refusals."""

from __future__ import annotations

import contextlib
import os
import re
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

import saccade
from dense import classified, flat, qkv
from saccade import Attention, SpecError, Unsupported, distributed, edits, masks, normalizers, scores, selectors, stats
from saccade.core.ring import chunks
from saccade.study.measure import peak_bytes

RANKS = 4
N = 53  # the ranks do not divide it
LONG, WIDTH = 8192, 256
ROWS = (stats.LogSumExp, stats.Max, stats.Entropy, stats.MeanDistance, partial(stats.TopK, 3))


def watched(edited: bool = True) -> list[stats.Stat]:
    region = stats.RegionMass({"first": slice(0, 5), "odd": slice(1, None, 2)}, edited=edited)
    return [*(s(edited=edited) for s in ROWS), region, stats.KeyMass(edited=edited)]


def documents() -> masks.Mask:
    return masks.Documents(torch.tensor([0] * 20 + [1] * 13 + [2] * 18 + [-1] * 2))


def learned(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64))


def relative(score: Tensor, b: Any, h: Any, q: Tensor, k: Tensor) -> Tensor:
    return score - 0.02 * (q - k).abs() * (h + 1)


@dataclass
class Case:
    """A program made by ``make``, on queries and keys of a shape, with stats."""

    make: Callable[[], Attention]
    watch: Callable[[], list[stats.Stat]] = list
    shape: tuple[int, int, int, int, int] = (1, 2, 2, N, N)
    zigzag: bool = True
    offset: int | None = None
    spoil: list[int] = field(default_factory=list)  # keys that hold NaN on the ranks


def window() -> masks.Mask:
    return masks.Causal() & (masks.Window(9) | masks.Sinks(2))


CASES = {
    "full": Case(Attention),
    "full, one part each": Case(Attention, watched, zigzag=False),
    "causal": Case(lambda: Attention(mask=masks.Causal()), shape=(2, 4, 2, N, N)),
    "causal, one part each": Case(lambda: Attention(mask=masks.Causal()), zigzag=False),
    "causal, watched": Case(lambda: Attention(mask=masks.Causal()), watched, shape=(2, 4, 2, N, N)),
    "fewer positions than parts": Case(lambda: Attention(mask=masks.Causal()), watched, shape=(1, 2, 1, 5, 5)),
    "queries are the last": Case(lambda: Attention(mask=masks.Causal()), watched, shape=(1, 2, 2, 21, N)),
    "more queries than keys": Case(lambda: Attention(mask=masks.Causal()), shape=(1, 2, 2, N, 12), offset=0),
    "window and sinks": Case(lambda: Attention(mask=window()), watched, shape=(1, 4, 2, 600, 600)),
    "documents": Case(lambda: Attention(mask=masks.Causal() & documents()), watched),
    "padding": Case(
        lambda: Attention(mask=masks.Padding(torch.arange(N)[None] % 5 != 2)), watched, spoil=list(range(2, N, 5))
    ),
    "mask tensor": Case(lambda: Attention(mask=torch.rand(N, N, generator=torch.Generator().manual_seed(1)) > 0.6)),
    "ALiBi": Case(lambda: Attention(scores.ALiBi(), masks.Causal()), shape=(1, 4, 2, N, N)),
    "ALiBi, learned": Case(
        lambda: Attention(scores.ALiBi(learned(4)), masks.Causal()), lambda: [stats.LogSumExp()], shape=(1, 4, 2, N, N)
    ),
    "learned biases": Case(
        lambda: Attention(
            [scores.Bilinear(learned(8, 8)), scores.SoftCap(3), scores.RelativeBias(2, 16, table=learned(2, 33))],
            window(),
        ),
        watched,
    ),
    "additive scores": Case(
        lambda: Attention(scores.Additive(learned(5, 8), learned(5, 8), learned(5)), masks.Causal()), watched
    ),
    "plain functions": Case(
        lambda: Attention(relative, lambda b, h, q, k: (q - k) % 3 != 1, edits=[lambda w, b, h, q, k: w * w]),
        watched,
        shape=(1, 2, 2, 21, N),
    ),
    "sink": Case(
        lambda: Attention(mask=window(), normalizer=normalizers.Softmax(learned(4))), watched, shape=(1, 4, 2, N, N)
    ),
    "off by one": Case(lambda: Attention(normalizer=normalizers.Softmax(off_by_one=True))),
    "sigmoid": Case(lambda: Attention(mask=masks.Causal(), normalizer=normalizers.Sigmoid()), watched),
    "sigmoid, learned": Case(lambda: Attention(normalizer=normalizers.Sigmoid(learned(2)))),
    "relu": Case(lambda: Attention(scores.ALiBi(), masks.Causal(), normalizers.ReLU(divisor=N)), watched),
    "relu, rows divided": Case(
        lambda: Attention(mask=masks.Causal(), normalizer=normalizers.ReLU(row_norm=True, divisor=2)),
        lambda: [stats.Max(), stats.LogSumExp()],
    ),
    "identity": Case(lambda: Attention(mask=window(), normalizer=normalizers.Identity())),
    "edits that scale": Case(
        lambda: Attention(
            mask=masks.Causal(),
            edits=[edits.Scale(0.5, keys=slice(0, 4)), edits.Zero(queries=[7, 30], heads=1), edits.Dropout(0.3, 5)],
        ),
        watched,
    ),
    "edits, learned": Case(
        lambda: Attention(
            mask=masks.Causal(), edits=[edits.Scale(learned(2), keys=slice(3, 30)), edits.Mix("identity", learned())]
        ),
        watched,
    ),
    "heads are mixed": Case(
        lambda: Attention(
            scores.MixHeads(learned(4, 4)), masks.Causal(), edits=[edits.MixHeads(learned(4, 4)), edits.Replace(0.1, 2)]
        ),
        watched,
        shape=(2, 4, 2, N, N),
    ),
    "edits that do more than scale": Case(
        lambda: Attention(mask=window(), edits=[edits.MixHeads(learned(2, 2)), lambda w, b, h, q, k: w * w])
    ),
    "renormalized": Case(
        lambda: Attention(mask=window(), edits=[edits.Scale(0.5, keys=slice(0, 4)), edits.Renormalize()]),
        partial(watched, edited=False),
    ),
}


def near(got: Tensor, want: Tensor, what: str, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance, msg=lambda told: f"{what}: {told}")


def drawn(like: Tensor, seed: int) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def finite(x: Tensor) -> Tensor:
    return torch.where(torch.isfinite(x), x, 0)


def compare(case: Case, group: dist.ProcessGroup | None, seed: int) -> None:
    """One case on this rank, against the single process: results, and gradients of a loss over all of them."""
    spec, watch = case.make().double(), case.watch()
    whole = qkv(case.shape, seed=seed)
    want = flat(saccade.attention(*whole, spec, stats=watch, backend="reference", offset=case.offset))
    cut = partial(distributed.split, dim=2, group=group, zigzag=case.zigzag)
    mine = [cut(x.detach()) for x in whole]
    here = distributed.positions(case.shape[4], group, zigzag=case.zigzag)
    for x in mine[1:]:
        x[:, :, torch.isin(here, torch.tensor(case.spoil))] = float("nan")
    mine = [x.requires_grad_() for x in mine]
    got = flat(distributed.attention(*mine, spec, group=group, stats=watch, offset=case.offset, zigzag=case.zigzag))
    for i, (x, y) in enumerate(zip(want, got, strict=True)):
        near(y, cut(x), f"result {i}")
    # The ranks' losses add up to that of the single process.
    summed = [i for i, x in enumerate(want) if x.is_floating_point()]
    single = sum((finite(want[i]) * drawn(want[i], i)).sum() for i in summed)
    shared = sum((finite(got[i]) * cut(drawn(want[i], i))).sum() for i in summed)
    parts = spec.learned()
    exact = torch.autograd.grad(single, [*whole, *parts], allow_unused=True)
    found = torch.autograd.grad(shared, [*mine, *parts], allow_unused=True)
    for i, (x, y) in enumerate(zip(exact, found, strict=True)):
        near(y, cut(x) if i < 3 else x, f"gradient {i}", 1e-8)


def a_loss_on_one_rank(group: dist.ProcessGroup) -> None:
    """The entropy and mass of the first rank alone: all ranks still go the same rounds."""
    spec, watch = Attention(mask=masks.Causal()), [stats.Entropy(), stats.KeyMass()]
    whole = qkv((1, 2, 1, N, N))
    first = distributed.positions(N, group) if dist.get_rank(group) == 0 else torch.zeros(0, dtype=torch.int64)
    mine = [distributed.split(x.detach(), 2, group).requires_grad_() for x in whole]
    out, seen = distributed.attention(*mine, spec, group=group, stats=watch)
    looked = seen["entropy"].sum() + seen["key_mass"].square().sum() if len(first) else out.sum() * 0
    told = [torch.zeros_like(first)] * dist.get_world_size(group)
    dist.all_gather_object(told, first, group=group)
    _, seen = saccade.attention(*whole, spec, stats=watch)
    exact = seen["entropy"][..., told[0]].sum() + seen["key_mass"][..., told[0]].square().sum()
    for x, y in zip(torch.autograd.grad(exact, whole[:2]), torch.autograd.grad(looked, mine[:2]), strict=True):
        near(y, distributed.split(x, 2, group), "gradient")


def shards_and_dtypes(group: dist.ProcessGroup) -> None:
    """What is split comes back; bfloat16 is as near as one bfloat16 process."""
    x = torch.arange(2 * 11 * 3).view(2, 11, 3)
    for zigzag in (True, False):
        mine = distributed.split(x, 1, group, zigzag=zigzag)
        near(x[:, distributed.positions(11, group, zigzag=zigzag)], mine, "positions")
        near(distributed.gather(mine, 1, group, zigzag=zigzag), x, "gathered")
    spec = Attention(scores.ALiBi(), masks.Causal())
    exact = [x.detach().requires_grad_() for x in qkv((1, 4, 2, 200, 200), 16)]
    want = saccade.attention(*exact, spec)
    wanted = torch.autograd.grad(want.sum(), exact)
    for dtype in (torch.bfloat16, torch.float16):
        mine = [distributed.split(x.detach().to(dtype), 2, group).requires_grad_() for x in exact]
        out = distributed.attention(*mine, spec, group=group)
        assert out.dtype == dtype
        for got, x in zip([out, *torch.autograd.grad(out.sum(), mine)], [want, *wanted], strict=True):
            near(got.double(), distributed.split(x, 2, group), f"{dtype}", 3e-2)


def refusals(group: dist.ProcessGroup) -> None:
    """Whatever is wrong on one rank is told by all."""
    last = dist.get_rank(group) == dist.get_world_size(group) - 1
    q = distributed.split(torch.randn(1, 2, N, 8), 2, group)
    for wrong, told in (
        (lambda: distributed.attention(q[0] if last else q, q, q, group=group), "batch, heads, length, width"),
        (lambda: distributed.attention(*[q.double() if last else q] * 3, group=group), "ranks disagree on dtype"),
        (lambda: distributed.attention(q, q, q, group=group, zigzag=last), "ranks disagree on zigzag"),
        (lambda: distributed.attention(*[q.clone().requires_grad_(last)] * 3, group=group), "disagree on gradient"),
        (lambda: distributed.attention(q[:, :, 3:] if last else q, q, q, group=group), "use saccade.distributed.split"),
        (lambda: distributed.gather(q[:, :, 3:] if last else q, 2, group), "use saccade.distributed.split"),
        (lambda: distributed.split(q[:, :, :1], 2, group), "each needs a position"),
    ):
        with pytest.raises(SpecError, match=told):
            wrong()
    with pytest.raises(Unsupported, match="the normalizer Sparsemax needs all scores of a row at once"):
        distributed.attention(q, q, q, Attention(normalizer=normalizers.Sparsemax()), group=group)


def memory(group: dist.ProcessGroup) -> int:
    """Most bytes beyond the inputs that forward and backward of a long sequence hold on this rank."""
    spec = Attention(mask=masks.Causal() & masks.Window(64))
    n = len(distributed.positions(LONG, group))
    inputs = [torch.randn(1, 1, n, WIDTH, requires_grad=True) for _ in range(3)]

    def call() -> None:
        torch.autograd.grad(distributed.attention(*inputs, spec, group=group).sum(), inputs)

    call()
    return peak_bytes(call, torch.device("cpu"))


def work(rank: int, folder: str) -> None:
    """What each process does: every case among all ranks, then half of them among two, the other pair the rest."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    broken, held = [], {}
    for size, group in ((RANKS, dist.group.WORLD), (2, pairs[rank // 2])):
        every = list(enumerate(CASES.items()))[slice(None) if size == RANKS else slice(rank // 2, None, 2)]
        tries = {name: partial(compare, case, group, seed) for seed, (name, case) in every}
        tries |= {f.__name__: partial(f, group) for f in (a_loss_on_one_rank, shards_and_dtypes, refusals)}
        for name, attempt in tries.items():
            large = name in CASES and CASES[name].shape[3] > 100
            for way in (contextlib.nullcontext, classified) if large else (contextlib.nullcontext,):
                try:
                    with way():
                        attempt()
                except AssertionError as error:
                    broken.append(f"{name}, {size} ranks: {error}")
        held[size] = memory(group)
    torch.save((broken, held), f"{folder}/{rank}")
    dist.destroy_process_group()


def test_ranks_equal_the_single_process_and_share_its_memory(tmp_path):
    mp.spawn(work, (str(tmp_path),), RANKS)
    told = [torch.load(tmp_path / str(rank)) for rank in range(RANKS)]
    broken = [line for lines, _ in told for line in lines]
    assert not broken, "\n".join(broken)
    most = {size: max(held[size] for _, held in told) for size in (2, RANKS)}
    assert most[RANKS] < 0.6 * most[2], most
    assert most[2] < 16 * LONG // 2 * WIDTH * 4  # some times what a rank holds of the queries


@pytest.fixture
def alone(tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("name", ["causal, watched", "sink", "renormalized"])
def test_one_process_is_a_ring_too(alone, name):
    compare(CASES[name], None, 0)


def test_without_processes_there_is_an_error_that_says_so():
    with pytest.raises(SpecError, match="init_process_group first"):
        distributed.positions(8)


class Mine(edits.Edit):
    def forward(self, weights: Tensor, at: saccade.At, visible: Tensor | None) -> Tensor:
        return weights / weights.amax(-1, keepdim=True)


@pytest.mark.parametrize(
    ("parts", "watch", "told"),
    [
        ({"normalizer": normalizers.Entmax()}, [], "the normalizer Entmax needs all scores of a row"),
        ({"normalizer": normalizers.TopKSoftmax(3)}, [], "the normalizer TopKSoftmax needs all scores of a row"),
        ({"normalizer": normalizers.Signed()}, [], "the normalizer Signed needs all scores of a row"),
        ({"select": selectors.TopKBlocks(2)}, [], "TopKBlocks .* chooses among all keys"),
        ({"edits": [edits.Redistribute(0, 1)]}, [], "the edit Redistribute needs all weights"),
        ({"edits": [edits.Mix("uniform", 0.5)]}, [], "the edit Mix needs all weights"),
        ({"edits": [edits.OnHeads(Mine(), 0)]}, [], "the edit Mine needs all weights"),
        ({"edits": [edits.Renormalize(), edits.Zero(0)]}, [], "Renormalize .* may only be the last edit"),
        ({"edits": [edits.Renormalize()]}, [stats.Entropy()], r"Entropy\(edited=False\) looks at them before"),
        ({"normalizer": normalizers.ReLU(row_norm=True)}, [stats.KeyMass(edited=False)], "the stat KeyMass needs"),
        ({"normalizer": normalizers.ReLU(row_norm=True), "edits": [edits.Zero(0)]}, [], "the edits would act on"),
        ({}, [stats.BlockMax()], "the stat BlockMax has no merge"),
        ({}, [stats.Rows([0])], "the stat Rows has no merge"),
    ],
)
def test_what_needs_whole_rows_is_refused_by_name(alone, parts, watch, told):
    x = torch.randn(1, 2, 8, 4)
    with pytest.raises(Unsupported, match=told):
        distributed.attention(x, x, x, Attention(**parts), stats=watch)


@pytest.mark.parametrize("zigzag", [True, False])
@pytest.mark.parametrize("length", [64, 53, 9, 5])
def test_the_parts_are_the_whole(length, zigzag):
    held = [chunks(length, rank, RANKS, zigzag) for rank in range(RANKS)]
    assert sorted(p for mine in held for c in mine for p in range(c.start, c.stop)) == list(range(length))
    for mine in held:
        assert [p for c in mine for p in range(*c.here.indices(99))] == list(range(sum(map(len, mine))))


def test_zigzag_gives_every_rank_the_same_share_of_a_causal_mask():
    def seen(rank: int, zigzag: bool) -> int:
        return sum(p + 1 for c in chunks(64, rank, RANKS, zigzag) for p in range(c.start, c.stop))

    assert {seen(rank, True) for rank in range(RANKS)} == {64 * 65 // 2 // RANKS}
    assert seen(RANKS - 1, False) > 6 * seen(0, False)


def test_the_example_of_the_docs_runs(monkeypatch):
    block = re.search(r"```python\n(.*?)```", (Path(__file__).parent.parent / "docs/distributed.md").read_text(), re.S)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
    for name, value in told.items():
        monkeypatch.setenv(name, str(value))
    exec(compile(block[1], "docs/distributed.md", "exec"), {})
