"""Measure kernelised attention against SDPA, and against peers that run here, in the same run: `make bench`.

Lengths, variants and peers take turns in every round; medians are shown. 8 heads of 64, float32. With glibc, the
allocator keeps what is freed, as PyTorch's tuning guide advises for CPUs (there by jemalloc): otherwise the pages of a
long output come new from the system at every call, and that is measured. --fresh leaves it as it comes.
Usage: linear.py [--only WORD] [--rounds N] [--fresh] [--peers SITE_PACKAGES] [--json FILE]

Peers: transformers' own chunked gated delta rule (Qwen3-Next) and, from a folder given with --peers (pip install
--target, without dependencies), the naive references of flash-linear-attention, performer-pytorch and
linear-attention-transformer.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

import saccade
from saccade import LinearAttention
from saccade.core.linear import features

HEADS, WIDTH = 8, 64
SAMPLE = 65536  # tokens: a shorter call is repeated until a sample has as many, so that all meet the same mood
PEER_LENGTH = 1024
Call = Callable[[], Any]
Rows = list[dict[str, Any]]


def keep_freed_memory() -> bool:
    """Let malloc return nothing to the system; False where it is not glibc's."""
    trim_threshold, mmap_max = -1, -4  # of mallopt(3)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(trim_threshold, 2**31 - 1) and mallopt(mmap_max, 0))


def seconds(calls: dict[Any, tuple[Call, int]], rounds: int) -> dict[Any, float]:
    """Median seconds of each call over rounds in which all take turns, each repeated so many times.

    The machine's speed moves from round to round: what all calls of a round were slower by, in the geometric mean, is
    taken out before the medians.
    """
    seen: dict[Any, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, (call, times) in calls.items():
            start = time.perf_counter()
            for _ in range(times):
                call()
            if number:  # the first round warms up
                seen[name].append((time.perf_counter() - start) / times)
    moods = [statistics.geometric_mean(taken) for taken in zip(*seen.values(), strict=True)]
    usual = statistics.median(moods)
    return {name: statistics.median(s / m for s, m in zip(taken, moods, strict=True)) * usual
            for name, taken in seen.items()}  # fmt: skip


def inputs(n: int, grad: bool = False) -> list[Tensor]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, HEADS, n, WIDTH) for _ in range(3))
    return [x.requires_grad_(grad) for x in (q, F.normalize(k, dim=-1), v)]


def variants(n: int) -> dict[str, tuple[LinearAttention, dict[str, Tensor]]]:
    """The programs, by the name of what is added."""
    scalar, channel = -torch.rand(1, HEADS, n) / 10, -torch.rand(1, HEADS, n, WIDTH) / 10
    beta = torch.rand(1, HEADS, n)
    return {
        "plain": (LinearAttention(), {}),
        "elu + 1, normalized": (LinearAttention(features.Elu1(), normalize=True), {}),
        "constant decay": (LinearAttention(decay=-torch.rand(HEADS)), {}),
        "scalar decay": (LinearAttention(), {"log_decay": scalar}),
        "channel decay": (LinearAttention(), {"log_decay": channel}),
        "delta rule": (LinearAttention(delta=True), {"beta": beta}),
        "gated delta rule": (LinearAttention(delta=True), {"beta": beta, "log_decay": scalar}),
        "channel-gated delta rule": (LinearAttention(delta=True), {"beta": beta, "log_decay": channel}),
    }


def causal_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def both_ways(call: Callable[..., Tensor], given: list[Tensor], g: Tensor) -> Call:
    return lambda: torch.autograd.grad(call(*given), given, g)


def against_sdpa(n: int, rounds: int, grad: bool) -> Rows:
    """All variants at one length."""
    given = inputs(n, grad)
    g = torch.randn(1, HEADS, n, WIDTH)
    programs: dict[str, Callable[..., Tensor]] = {
        name: lambda q, k, v, spec=spec, options=options: saccade.linear_attention(q, k, v, spec, **options)
        for name, (spec, options) in variants(n).items()
    }
    programs["SDPA"] = causal_sdpa
    calls: dict[str, tuple[Call, int]] = {
        name: (both_ways(program, given, g) if grad else lambda program=program: program(*given), max(1, 8192 // n))
        for name, program in programs.items()
    }
    found = seconds(calls, rounds)
    sdpa = found.pop("SDPA")
    work = "forward and backward" if grad else "forward"
    return [
        {"work": work, "what": name, "tokens": n, "tokens/s": n / s, "SDPA tokens/s": n / sdpa, "ratio": s / sdpa}
        for name, s in found.items()
    ]


def forward(rounds: int) -> Rows:
    return [row for n in (1024, 2048, 4096) for row in against_sdpa(n, rounds, grad=False)]


def backward(rounds: int) -> Rows:
    return [row for n in (2048, 4096) for row in against_sdpa(n, rounds, grad=True)]


def lengths(rounds: int) -> Rows:
    """Tokens per second from 1k to 256k, the lengths taking turns; the ratio is to the fastest length."""
    rows: Rows = []
    q, k, v = inputs(262144)
    for name in ("plain", "elu + 1, normalized"):
        spec, _ = variants(1)[name]
        calls: dict[int, tuple[Call, int]] = {}
        for n in (1024, 4096, 16384, 65536, 262144):
            times = max(1, SAMPLE // n)
            cuts = [[x[:, :, i * n : (i + 1) * n].contiguous() for x in (q, k, v)] for i in range(times)]
            turns = itertools.cycle(cuts)  # other inputs at every call: a short one's own would lie in the cache
            run = lambda turns=turns, spec=spec: saccade.linear_attention(*next(turns), spec)  # noqa: E731
            calls[n] = (run, times)
        rates = {n: n / s for n, s in seconds(calls, rounds).items()}
        best = max(rates.values())
        rows += [
            {"work": "forward by length", "what": name, "tokens": n, "tokens/s": r, "ratio": best / r}
            for n, r in rates.items()
        ]
    return rows


def trained_lengths(rounds: int) -> Rows:
    """The same forward and backward, to 64k (at 256k the gradients alone would take 4 GB)."""
    calls: dict[int, tuple[Call, int]] = {}
    spec = LinearAttention()
    for n in (1024, 4096, 16384, 65536):
        given = inputs(n, True)
        run = both_ways(lambda q, k, v: saccade.linear_attention(q, k, v, spec), given, torch.randn(1, HEADS, n, WIDTH))
        calls[n] = (run, max(1, SAMPLE // n))
    rates = {n: n / s for n, s in seconds(calls, rounds).items()}
    best = max(rates.values())
    return [
        {"work": "forward and backward by length", "what": "plain", "tokens": n, "tokens/s": r, "ratio": best / r}
        for n, r in rates.items()
    ]


def decode(rounds: int) -> Rows:
    """One token after so many: a step, and what is kept; SDPA reads its cache."""
    calls: dict[tuple[str, int], tuple[Call, int]] = {}
    kept: dict[tuple[str, int], int] = {}
    for n in (1024, 16384, 131072):
        q, k, v = inputs(n)
        for name in ("elu + 1, normalized", "gated delta rule"):
            spec, options = variants(n)[name]
            _, state = saccade.linear_attention(q, k, v, spec, return_state=True, **options)
            one = [x[:, :, -1:].contiguous() for x in (q, k, v)]
            last = {key: x[:, :, -1:] for key, x in options.items()}

            def step(one: Any = one, spec: Any = spec, state: Any = state, last: Any = last) -> None:
                saccade.linear_attention(*one, spec, state=state, return_state=True, **last)

            calls[name, n] = (step, 200)
            kept[name, n] = sum(x.nbytes for x in (state.S, state.z) if x is not None)
        calls["SDPA", n] = (lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q[:, :, -1:], k, v), 20)
        kept["SDPA", n] = k.nbytes + v.nbytes
    found = seconds(calls, rounds)
    return [
        {"work": "decode step", "what": name, "tokens": n, "microseconds": s * 1e6, "kept MB": kept[name, n] / 1e6,
         "ratio": s / found["SDPA", n]}
        for (name, n), s in found.items()
    ]  # fmt: skip


def load(path: Path, *names: str) -> list[Callable[..., Any]]:
    """Functions of one file, without the package around it (fla's needs Triton)."""
    spec = importlib.util.spec_from_file_location(path.parent.name + path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return [getattr(module, name) for name in names]


def peers(folder: Path | None) -> dict[str, tuple[str, Callable[..., Tensor], Callable[..., Any]]]:
    """Peers by name: the variant that they compute, the peer, and ours as the peer means it (q, k, v as given)."""
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    n = PEER_LENGTH
    scale = WIDTH**-0.5
    log_decay, channel, beta = (variants(n)[name][1] for name in ("scalar decay", "channel decay", "delta rule"))
    g, gk, b = log_decay["log_decay"], channel["log_decay"], beta["beta"]

    def swap(*tensors: Tensor) -> list[Tensor]:
        return [x.transpose(1, 2) for x in tensors]

    def ours(spec: LinearAttention, **options: Tensor) -> Callable[..., Tensor]:
        return lambda q, k, v: saccade.linear_attention(q, k, v, spec, **options)

    gated = ours(LinearAttention(delta=True, scale=scale), log_decay=g, beta=b)
    found: dict[str, tuple[str, Callable[..., Tensor], Callable[..., Any]]] = {
        "transformers, Qwen3-Next": (
            "gated delta rule",
            lambda q, k, v: torch_chunk_gated_delta_rule(*swap(q, k, v, g, b))[0].transpose(1, 2),
            gated,
        )
    }
    if folder is None:
        return found
    sys.path.append(str(folder))
    ops = folder / "fla" / "ops"
    (chunk_linear,) = load(ops / "linear_attn" / "naive.py", "naive_chunk_linear_attn")
    (chunk_simple,) = load(ops / "simple_gla" / "naive.py", "naive_chunk_simple_gla")
    (chunk_gated,) = load(ops / "gated_delta_rule" / "naive.py", "naive_chunk_gated_delta_rule")
    (chunk_kda,) = load(ops / "kda" / "naive.py", "naive_chunk_kda")
    (chunk_delta,) = load(ops / "delta_rule" / "naive.py", "delta_rule_chunkwise")
    (recurrent_gla,) = load(ops / "gla" / "naive.py", "naive_recurrent_gla")
    from linear_attention_transformer.linear_attention_transformer import causal_linear_attn
    from performer_pytorch.performer_pytorch import causal_linear_attention_noncuda

    # both write k's features themselves or expect them; bucket 1 is the exact one (bigger ones are blind in a bucket)
    softmax_exp = LinearAttention(features.Pair(lambda x: x.softmax(-1) * scale, torch.exp), normalize=True, eps=0.0)
    positive = LinearAttention(torch.abs, normalize=True)
    return found | {
        "fla naive chunk": (
            "plain", lambda q, k, v: chunk_linear(*swap(q, k, v)).transpose(1, 2), ours(LinearAttention(scale=scale))
        ),
        "fla naive chunk, simple GLA": (
            "scalar decay", lambda q, k, v: chunk_simple(*swap(q, k, v, g))[0].transpose(1, 2),
            ours(LinearAttention(scale=scale), log_decay=g),
        ),
        "fla naive recurrent, GLA": (
            "channel decay", lambda q, k, v: recurrent_gla(*swap(q, k, v, gk))[0].transpose(1, 2),
            ours(LinearAttention(scale=scale), log_decay=gk),
        ),
        "fla naive chunk, delta": (
            "delta rule", lambda q, k, v: chunk_delta(q, k, v, b)[0],
            ours(LinearAttention(scale=scale, delta=True), beta=b),
        ),
        "fla naive chunk, gated delta": (
            "gated delta rule", lambda q, k, v: chunk_gated(*swap(q, k, v, g, b))[0].transpose(1, 2), gated
        ),
        "fla naive chunk, KDA": (
            "channel-gated delta rule", lambda q, k, v: chunk_kda(*swap(q, k, v, gk, b))[0].transpose(1, 2),
            ours(LinearAttention(scale=scale, delta=True), log_decay=gk, beta=b),
        ),
        "performer-pytorch, causal": (
            "|x|, normalized", lambda q, k, v: causal_linear_attention_noncuda(q.abs(), k.abs(), v), ours(positive)
        ),
        "linear-attention-transformer": (
            "softmax and exp, normalized", lambda q, k, v: causal_linear_attn(q, k, v, bucket_size=1),
            ours(softmax_exp),
        ),
    }  # fmt: skip


def against_peers(rounds: int, folder: Path | None) -> Rows:
    """The same computation by a peer at 1k tokens, and by how much the results differ."""
    q, k, v = inputs(PEER_LENGTH)
    rows: Rows = []
    for name, (what, theirs, ours) in peers(folder).items():
        difference = float((theirs(q, k, v) - ours(q, k, v)).abs().max())
        calls: dict[str, tuple[Call, int]] = {
            "ours": (lambda ours=ours: ours(q, k, v), 1), "peer": (lambda theirs=theirs: theirs(q, k, v), 1)
        }  # fmt: skip
        found = seconds(calls, rounds)
        rows.append(
            {"work": f"forward, against {name}", "what": what, "tokens": PEER_LENGTH,
             "tokens/s": PEER_LENGTH / found["ours"], "peer's tokens/s": PEER_LENGTH / found["peer"],
             "ratio": found["ours"] / found["peer"], "difference": difference}
        )  # fmt: skip
    return rows


def shown(value: Any) -> str:
    if not isinstance(value, float):
        return "" if value is None else str(value)
    return f"{value:.1e}" if 0 < value < 0.005 else f"{value:.2f}" if value < 100 else f"{value:,.0f}"


def show(rows: Rows) -> Table:
    table = Table(title=f"saccade {saccade.__version__}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    names = list(dict.fromkeys(name for row in rows for name in row))
    for name in names:
        table.add_column(name, justify="left" if name in ("work", "what") else "right")
    for row in rows:
        table.add_row(*(shown(row.get(name)) for name in names))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="run the groups whose name contains this word")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--fresh", action="store_true", help="leave the allocator as it comes")
    parser.add_argument("--peers", type=Path, help="a folder of packages to compare with")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    kept = not options.fresh and keep_freed_memory()
    console = Console(width=None if sys.stdout.isatty() else 160)
    found: Rows = []
    for group in (forward, backward, lengths, trained_lengths, decode, against_peers):
        if options.only in group.__name__:
            with console.status(group.__name__):
                rows = group(options.rounds, options.peers) if group is against_peers else group(options.rounds)  # type: ignore[operator]
            console.print(show(rows))
            found += rows
    if options.json:
        machine = {"torch": torch.__version__, "threads": torch.get_num_threads(), "memory kept": kept, "rows": found}
        options.json.write_text(json.dumps(machine, indent=1))


if __name__ == "__main__":
    main()
