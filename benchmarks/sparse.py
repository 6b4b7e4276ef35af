"""Measure sparse attention against causal SDPA in the same run, and how its cost grows: `make bench`.

Usage as of attention.py. A growth row's ratio is the slope of seconds over length from 4k to 128k, in logarithms.
"""

from __future__ import annotations

import math
import statistics

import torch

import saccade
from attention import HEADS, WIDTH, Call, Row, inputs, peak_bytes, report, sdpa, timed
from saccade import Attention, catalog, masks, selectors

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
    report([selected, patterned, estimated, grown], __doc__)
