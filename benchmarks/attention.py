"""Measure the engine against its peers in the same run: `make bench`.

Every row interleaves saccade with its peer, repeats, and prints the ratio of the medians beside the goal; the share of
the matrix-product rate that the useful work reaches; and the peak memory that a call adds. Cells that lose are shown.
Usage: attention.py [--only WORD] [--repeats N] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import saccade
from saccade import Attention, edits, masks, normalizers, scores, stats
from saccade.study.measure import peak_bytes as peak_bytes_on

HEADS, WIDTH = 8, 64
Call = Callable[[], object]


def peak_bytes(call: Call) -> int:
    return peak_bytes_on(call, torch.device("cpu"))


@dataclass
class Row:
    """One line of the table. Times are medians in seconds, flops those of the cells that must be computed."""

    work: str
    peer: str
    seconds: float
    peer_seconds: float
    goal: float | None
    flops: float = 0.0
    memory: int = 0
    peer_memory: int = 0
    note: str = ""
    others: dict[str, float] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        return self.seconds / self.peer_seconds


def inputs(n: int, dtype: torch.dtype = torch.float32, grad: bool = False, heads: int = HEADS) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(1, heads, n, WIDTH, dtype=dtype, requires_grad=grad) for _ in range(3)]


def timed(calls: list[Call], repeats: int) -> list[float]:
    """Median seconds of each call, the calls taking turns so that they share the machine's moods."""
    seen: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    for _ in range(repeats):
        for times, call in zip(seen, calls, strict=True):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    return [statistics.median(times) for times in seen]


def sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def eager(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    s = (q @ k.mT) * WIDTH**-0.5
    if causal:
        s = s.masked_fill(torch.ones(s.shape[-2:], dtype=torch.bool).triu(1), -math.inf)
    return torch.softmax(s, -1) @ v


def both_ways(call: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Call:
    def run() -> None:
        torch.autograd.grad(call(q, k, v), [q, k, v], g, allow_unused=True)  # some share queries and keys

    return run


def compare(
    work: str, ours: Call, peer: str, theirs: Call, goal: float | None, repeats: int, *, cells: float = 0.0,
    times: int = 2, note: str = "", **others: Call,
) -> Row:  # fmt: skip
    ours_s, theirs_s, *rest = timed([ours, theirs, *others.values()], repeats)
    return Row(
        work, peer, ours_s, theirs_s, goal, 2.0 * times * cells * HEADS * WIDTH, peak_bytes(ours), peak_bytes(theirs),
        note, dict(zip(others, rest, strict=True)),
    )  # fmt: skip


def plain(repeats: int) -> list[Row]:
    n = 4096
    q, k, v = inputs(n)
    rows = []
    flex = torch.compile(flex_attention)
    for name, mask, causal in (("full", masks.Full(), False), ("causal", masks.Causal(), True)):
        spec = Attention(mask=mask)
        others: dict[str, Call] = {"eager": lambda causal=causal: eager(q, k, v, causal)}
        others["band"] = lambda spec=spec: saccade.attention(q, k, v, spec, backend="band")
        if not causal:
            others["flex"] = lambda: flex(q, k, v)
        rows.append(
            compare(
                f"plain {name}, N={n}", lambda spec=spec: saccade.attention(q, k, v, spec), "SDPA",
                lambda causal=causal: sdpa(q, k, v, causal), 1.05, repeats,
                cells=n * n / (2 if causal else 1), **others,
            )
        )  # fmt: skip
    return rows


def modified(repeats: int) -> list[Row]:
    n = 4096
    q, k, v = inputs(n)
    slopes = scores.ALiBi.geometric(HEADS)

    def alibi(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score + slopes[h] * (kv_idx - q_idx)

    built_in, function = Attention(score=scores.ALiBi()), Attention(score=alibi)
    flex = torch.compile(flex_attention)

    def first() -> float:
        """The whole life of a mechanism nobody ran before: a new function, its first call."""

        def fresh(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return score + slopes[h] * (kv_idx - q_idx)

        start = time.perf_counter()
        saccade.attention(q, k, v, Attention(score=fresh))
        return time.perf_counter() - start

    cold = first()
    rows = [
        compare(
            f"built-in ALiBi, full, N={n}", lambda: saccade.attention(q, k, v, built_in), "SDPA",
            lambda: sdpa(q, k, v), 1.4, repeats, cells=n * n,
        ),
        compare(
            f"score_mod, no compile, N={n}", lambda: saccade.attention(q, k, v, function), "flex compiled",
            lambda: flex(q, k, v, score_mod=alibi), 1.6, repeats, cells=n * n, sdpa=lambda: sdpa(q, k, v),
            eager_flex=lambda: flex_attention(q, k, v, score_mod=alibi),
        ),
        compare(
            f"score_mod, compile=True, N={n}", lambda: saccade.attention(q, k, v, function, compile=True),
            "flex compiled", lambda: flex(q, k, v, score_mod=alibi), 1.0, repeats, cells=n * n,
        ),
    ]  # fmt: skip
    steady = rows[1].peer_seconds
    rows.append(
        Row(f"score_mod, first call ever, N={n}", "flex compiled", cold, steady, 1.6, note="peer in steady state")
    )
    return rows


def observed(repeats: int) -> list[Row]:
    n = 8192
    q, k, v = inputs(n)
    spec = Attention(mask=masks.Causal(), edits=[edits.Scale(0.5, keys=slice(0, 4)), edits.Renormalize()])
    watch = [stats.Entropy(edited=False), stats.KeyMass(), stats.LogSumExp()]
    late = [stats.Entropy(), stats.KeyMass(), stats.LogSumExp()]
    return [
        compare(
            f"edit and three stats, causal, N={n}", lambda: saccade.attention(q, k, v, spec, stats=watch), "SDPA",
            lambda: sdpa(q, k, v, True), 1.6, repeats, cells=n * n / 2, note="under 150 MB extra",
            band=lambda: saccade.attention(q, k, v, Attention(mask=masks.Causal()), backend="band"),
        ),
        compare(
            f"the same, entropy of the edited weights, N={n}", lambda: saccade.attention(q, k, v, spec, stats=late),
            "SDPA", lambda: sdpa(q, k, v, True), None, repeats, cells=n * n / 2, note="one logarithm per weight",
        ),
    ]  # fmt: skip


def windowed(repeats: int) -> list[Row]:
    n, width = 16384, 512
    q, k, v = inputs(n)
    spec = Attention(mask=masks.Causal() & masks.Window(width))
    cells = n * width - width * (width - 1) / 2
    share = cells / (n * (n + 1) / 2)
    row = compare(
        f"causal window {width}, N={n}", lambda: saccade.attention(q, k, v, spec), "ideal", lambda: sdpa(q, k, v, True),
        1.7, repeats, cells=cells, note=f"ideal: {share:.1%} of causal SDPA",
    )  # fmt: skip
    row.peer_seconds *= share
    return [row]


def trained(repeats: int) -> list[Row]:
    n = 4096
    q, k, v = inputs(n, grad=True)
    g = torch.randn_like(q)
    peer = both_ways(sdpa, q, k, v, g)
    rows = []
    for name, spec in (
        ("sigmoid", Attention(normalizer=normalizers.Sigmoid())),
        ("entmax 1.5", Attention(normalizer=normalizers.Entmax(1.5))),
        ("edit", Attention(edits=[edits.Scale(0.5, keys=slice(0, 4)), edits.Renormalize()])),
        ("softmax in the band", Attention()),
    ):
        ours = both_ways(lambda q, k, v, spec=spec: saccade.attention(q, k, v, spec, backend="band"), q, k, v, g)
        rows.append(
            compare(
                f"forward and backward, {name}, N={n}", ours, "SDPA", peer, None if "band" in name else 3.0, repeats,
                cells=n * n, times=7,
            )
        )  # fmt: skip
    return rows


def decoded(repeats: int) -> list[Row]:
    """One query over a cache: what a decode step costs in each layer."""
    m = 4096
    q, k, v = inputs(m)
    q = q[:, :, -1:]
    window = Attention(mask=masks.Causal() & (masks.Window(1024) | masks.Sinks(4)))

    def many(call: Call) -> Call:
        return lambda: [call() for _ in range(50)]

    rows = []
    for name, spec in (("plain", Attention(mask=masks.Causal())), ("window and sinks", window)):
        row = compare(
            f"50 decode steps, {name}, {m} keys", many(lambda spec=spec: saccade.attention(q, k, v, spec)), "SDPA",
            many(lambda: sdpa(q, k, v)), None, repeats, note="SDPA reads every key",
        )  # fmt: skip
        rows.append(row)
    return rows


def mapped(repeats: int) -> list[Row]:
    n = 131072
    mask = masks.Causal() & (masks.Window(1024) | masks.Sinks(4))
    (ours,) = timed([lambda: masks.block_map(mask, n)], repeats)
    memory = peak_bytes(lambda: masks.block_map(mask, n))
    small = 16384

    def grid() -> None:
        window = lambda b, h, q, k: (q >= k) & ((q - k < 1024) | (k < 4))  # noqa: E731
        create_block_mask(window, 1, 1, small, small, device="cpu")

    (theirs,) = timed([grid], 1)
    return [
        Row(
            f"block map, causal window and sinks, N={n}", "0.1 s", ours, 0.1, 1.0, memory=memory,
            note=f"under 50 MB; flex needs {theirs:.1f} s at N={small}",
        )
    ]  # fmt: skip


def narrow(repeats: int) -> list[Row]:
    n = 8192
    q, k, v = inputs(n, torch.bfloat16)
    spec = Attention(mask=masks.Causal())
    row = compare(
        f"bfloat16, plain causal, N={n}", lambda: saccade.attention(q, k, v, spec), "SDPA bf16",
        lambda: sdpa(q, k, v, True), 0.65, repeats, cells=n * n / 2,
    )  # fmt: skip
    exact = sdpa(q.double(), k.double(), v.double(), True)
    ours, theirs = (
        float((out.double() - exact).abs().mean()) for out in (saccade.attention(q, k, v, spec), sdpa(q, k, v, True))
    )
    row.note = f"mean error {ours:.2e}, SDPA's {theirs:.2e}: {ours / theirs:.2f} of it (goal: at most 2)"
    return [row]


def product_rate() -> float:
    """Floating-point operations per second of a large float32 matrix product: the limit."""
    a = torch.randn(2048, 2048)
    (seconds,) = timed([lambda: a @ a], 5)
    return 2 * 2048**3 / seconds


def show(rows: list[Row], rate: float) -> Table:
    table = Table(title=f"saccade {saccade.__version__}, {torch.get_num_threads()} threads, {rate / 1e9:.0f} GFLOP/s")
    for name in ("work", "seconds", "peer", "ratio", "goal", "of product rate", "extra MB", "peer's MB", "also"):
        table.add_column(name, justify="left" if name in ("work", "peer", "also") else "right")
    for r in rows:
        met = r.goal is None or r.ratio <= r.goal
        also = [r.note] + [f"{name} {s:.3f} s" for name, s in r.others.items()]
        table.add_row(
            r.work, f"{r.seconds:.3f}", f"{r.peer} {r.peer_seconds:.3f}",
            f"[{'green' if met else 'red'}]{r.ratio:.2f}[/]", "" if r.goal is None else f"{r.goal:.2f}",
            f"{r.flops / r.seconds / rate:.0%}" if r.flops and "bfloat16" not in r.work else "",
            f"{r.memory / 1e6:.0f}" if r.memory else "", f"{r.peer_memory / 1e6:.0f}" if r.peer_memory else "",
            "; ".join(a for a in also if a),
        )  # fmt: skip
    return table


def report(groups: list[Callable[[int], list[Row]]], about: str) -> None:
    """Run groups of rows as the command line says, and print their table."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--only", default="", help="run the groups whose name contains this word")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    console = Console()
    rate = product_rate()
    rows: list[Row] = []
    for group in groups:
        if options.only in group.__name__:
            with console.status(group.__name__):
                rows += group(options.repeats)
    console.print(show(rows, rate))
    if options.json:
        machine = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__, "rate": rate}
        options.json.write_text(json.dumps(machine | {"rows": [asdict(r) for r in rows]}, indent=1))


if __name__ == "__main__":
    report([plain, modified, observed, windowed, decoded, trained, mapped, narrow], __doc__)
