"""Measure sparse attention against causal SDPA in the same run, and how its cost grows: `make bench`.

Usage as of attention.py. A growth row's ratio is the slope of seconds over length from 4k to 128k, in logarithms.
"""

from __future__ import annotations

import math
import statistics

import torch

import saccade
from attention import HEADS, WIDTH, Call, Row, both_ways, inputs, peak_bytes, report, sdpa, timed
from saccade import Attention, catalog, masks, selectors
from saccade.nn import MultiHead
from saccade.nn.backbones import Place

LENGTHS = [4096, 8192, 16384, 32768, 65536, 131072]
N_LOG_N, N_ROOT_N = 1.25, 1.6  # slopes allowed: N log N itself has 1.1 here, N^1.5 has 1.5


def selected(repeats: int) -> list[Row]:
    """Blocks of 128 keys chosen by content, the choice included; 13 and 6 are 9.9% and 4.6% of the causal blocks."""
    n, block = 32768, 128
    q, k, v = inputs(n)
    cases = [(90, 13, 256, 1 / 6.5), (90, 13, 128, 1 / 6.5), (95, 6, 256, 1 / 12), (95, 6, 128, 1 / 12)]

    def attend(keep: int, rows: int) -> Call:
        spec = Attention(mask=masks.Causal(), select=selectors.TopKBlocks(keep, block=block, rows=rows))
        return lambda: saccade.attention(q, k, v, spec)

    calls = [attend(keep, rows) for _, keep, rows, _ in cases]
    dense, *ours = timed([lambda: sdpa(q, k, v, True), *calls], min(repeats, 2))
    return [
        Row(
            f"{sparsity}% of blocks of {rows} x {block} left out by content, N={n}", "SDPA", seconds, dense, goal,
            4.0 * sum(min(keep, (r + 1) * rows // block) for r in range(n // rows)) * rows * block * HEADS * WIDTH,
            peak_bytes(call), note=f"{dense / seconds:.1f} times as fast",
        )
        for (sparsity, keep, rows, goal), call, seconds in zip(cases, calls, ours, strict=True)
    ]  # fmt: skip


def patterned(repeats: int) -> list[Row]:
    """Static patterns against the ideal: the share of the causal cells that they visit."""
    n = 32768
    q, k, v = inputs(n)
    specs = {
        "S2, stride 8, blocks of 128": catalog.find("s2")(block=128, local=2, stride=8).build(HEADS),
        "PowerAttention, blocks of 256": catalog.find("powerattention")(256).build(HEADS),
    }
    calls: list[Call] = [lambda spec=spec: saccade.attention(q, k, v, spec) for spec in specs.values()]
    dense, *ours = timed([lambda: sdpa(q, k, v, True), *calls], min(repeats, 2))
    rows = []
    for (name, spec), call, seconds in zip(specs.items(), calls, ours, strict=True):
        some = range(0, n, 509)
        seen = sum(float(_row(spec.mask, n, row).sum()) for row in some) / HEADS
        share = seen / sum(row + 1 for row in some)
        rows.append(
            Row(
                f"{name}, N={n}", "ideal", seconds, dense * share, 1 / 0.6, 2.0 * share * n * n * HEADS * WIDTH,
                peak_bytes(call), note=f"ideal: {share:.1%} of causal SDPA; {dense / seconds:.1f} times as fast",
            )
        )  # fmt: skip
    return rows


def _row(mask: masks.Mask, n: int, row: int) -> torch.Tensor:
    at = saccade.core.tile.At.everywhere(1, HEADS, 1, n, row, False, torch.device("cpu"))
    return mask.visible(at).expand(1, HEADS, 1, n)


def estimated(repeats: int) -> list[Row]:
    """HyperAttention, which approximates all keys; one head, since SDPA needs a minute for eight."""
    n = 131072
    q, k, v = inputs(n, heads=1)
    hyper = catalog.find("hyperattention")().make(WIDTH)
    with torch.no_grad():
        ours, dense = timed([lambda: hyper(q, k, v, causal=True), lambda: sdpa(q, k, v, True)], 1)
    note = f"{dense / ours:.1f} times as fast; the errors are in its claim"
    return [Row(f"HyperAttention, causal, N={n}, 1 head", "SDPA", ours, dense, 1 / 5, note=note)]


def stepped(repeats: int) -> list[Row]:
    """One query that chooses its blocks anew at every step, over a cache."""
    rows = []
    for m in (4096, 32768, 131072):
        q, k, v = inputs(m)
        q = q[:, :, -1:]
        spec = Attention(mask=masks.Causal(), select=selectors.TopKBlocks(16, block=64, rows=1))
        calls: list[Call] = [
            lambda q=q, k=k, v=v, spec=spec: [saccade.attention(q, k, v, spec) for _ in range(20)],
            lambda q=q, k=k, v=v: [sdpa(q, k, v) for _ in range(20)],
        ]
        ours, dense = timed(calls, repeats)
        note = "block means are taken anew at every step, so all keys are read, and no other value"
        rows.append(Row(f"20 decode steps, 16 blocks of 64 chosen, {m} keys", "SDPA", ours, dense, None, note=note))
    return rows


def trained(repeats: int) -> list[Row]:
    """Forward and backward of what is trained with its selection, 2 heads; DMA is a layer, and so is its peer."""
    n, heads = 8192, 2
    q, k, v = inputs(n, heads=heads, grad=True)
    g = torch.randn_like(q)
    programs = {
        "MoBA, 3 blocks of 512": catalog.find("moba")().build(heads),
        "landmark, blocks of 50": catalog.find("landmark")().build(heads),
        "landmark, 4 blocks of 50": catalog.find("landmark")(keep=4).build(heads),
        "routing, 90 clusters of 90": catalog.find("routing-transformer")(90, 90, online=True).build(heads),
    }
    calls = [
        both_ways(lambda q, k, v, spec=spec: saccade.attention(q, k, v, spec), q, k, v, g) for spec in programs.values()
    ]
    dense, *ours = timed([both_ways(lambda q, k, v: sdpa(q, k, v, True), q, k, v, g), *calls], min(repeats, 2))
    rows = [
        Row(f"forward and backward, {name}, N={n}", "SDPA", seconds, dense, None, memory=peak_bytes(call))
        for name, call, seconds in zip(programs, calls, ours, strict=True)
    ]
    width = heads * WIDTH
    x = torch.randn(1, n, width)
    dynamic = Place(width, heads, 0, 1, None, None).filled(catalog.find("dma")(1024).layer)
    plain = MultiHead(Attention(mask=masks.Causal()), width, heads)
    layers: list[Call] = [
        lambda layer=layer: torch.autograd.grad(layer(x).sum(), list(layer.parameters()), allow_unused=True)
        for layer in (dynamic, plain)
    ]
    ours_s, dense = timed(layers, min(repeats, 2))
    rows.append(
        Row(
            f"forward and backward, DMA, 1024 keys, a layer, N={n}", "SDPA's layer", ours_s, dense, None,
            memory=peak_bytes(layers[0]),
        )
    )  # fmt: skip
    return rows


def grown(repeats: int) -> list[Row]:
    """The slope of seconds over length, and of peak memory."""
    programs = {
        "PowerAttention": (lambda n: catalog.find("powerattention")(), 2, N_LOG_N),
        "HiP": (lambda n: catalog.find("hip")(rows=64, columns=16), 1, N_LOG_N),
        "superlinear": (lambda n: catalog.find("superlinear")(), 1, N_ROOT_N),
        "routing, sqrt(N) clusters": (
            lambda n: catalog.find("routing-transformer")(math.isqrt(n), math.isqrt(n)), 2, N_ROOT_N,
        ),
        "dense": (None, 1, None),
    }  # fmt: skip
    rows = []
    for name, (make, heads, goal) in programs.items():
        lengths = LENGTHS if make else LENGTHS[:4]
        seconds, memory = [], []
        for n in lengths:
            q, k, v = inputs(n, heads=heads)
            spec = make(n).build(heads) if make else Attention(mask=masks.Causal())
            k = q if name.startswith("routing") else k  # it shares queries and keys

            def call(q=q, k=k, v=v, spec=spec) -> object:
                with torch.no_grad():
                    return saccade.attention(q, k, v, spec)

            seconds += timed([call], 1 if n > 32768 else min(repeats, 3))
            memory.append(peak_bytes(call) + 4 * q.numel())  # with the result
        row = Row(f"growth of {name}, N={lengths[0]} to {lengths[-1]}", "1", _slope(lengths, seconds), 1.0, goal)
        row.memory = memory[-1]
        told = ", ".join(f"{s:.2f}" for s in seconds)
        row.note = f"seconds {told}; memory grows as N^{_slope(lengths, memory):.2f}"
        rows.append(row)
    return rows


def _slope(lengths: list[int], values: list[float]) -> float:
    return statistics.linear_regression([math.log(n) for n in lengths], [math.log(x) for x in values]).slope


if __name__ == "__main__":
    report([selected, patterned, estimated, stepped, trained, grown], __doc__)
