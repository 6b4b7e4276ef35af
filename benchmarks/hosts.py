"""What watching a model and holding fewer tokens cost, each against the model as it is in the same run.

    python benchmarks/hosts.py [--only watching]

watching: a prefill of 32k tokens of a small random Llama (2 layers, 4 heads of 32) with stats of every layer.
caching: single steps after a prompt of 16k tokens (4 layers, 8 heads of 64), with SnapKV and with all tokens held.
stepping: single steps after 1k and 16k tokens (4 layers, 8 heads of 32 over 4 key heads), with linear attention in
    place of softmax, over both kinds of cache that transformers has.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

import saccade
from saccade import LinearAttention, stats
from saccade.core.linear import features
from saccade.study.caching import decoding
from saccade.study.measure import peak_bytes
from saccade.systems.cache.snapkv import BUDGET, PROMPT, SMALLER, SPEEDUP, SnapKV

TURNS = 2  # the best counts


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@torch.no_grad()
def watching() -> list[tuple[str, str, str]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    n, layers, heads, width = 32768, 2, 4, 32
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=260, hidden_size=heads * width, intermediate_size=256, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=n,
        )
    ).eval()  # fmt: skip
    ids = torch.randint(0, 256, (1, n))
    q, k, v = (torch.randn(1, heads, n, width) for _ in range(3))
    device = torch.device("cpu")

    def prefill() -> None:
        model(ids, use_cache=False, logits_to_keep=1)

    def attention() -> None:
        for _ in range(layers):
            F.scaled_dot_product_attention(q, k, v, is_causal=True)

    watched = {
        "KeyMass": [stats.KeyMass()],
        "Entropy, KeyMass, LogSumExp": [stats.Entropy(), stats.KeyMass(), stats.LogSumExp()],
    }
    best = dict.fromkeys(["attention", "plain", *watched], math.inf)
    for turn in range(TURNS):
        for name in best:
            with saccade.watch(model, *watched[name]) if name in watched else contextlib.nullcontext():
                best[name] = min(best[name], seconds(attention if name == "attention" else prefill))
            print(f"turn {turn + 1}, {name}: {best[name]:.2f} s", flush=True)
    memory = peak_bytes(prefill, device)
    rows = []
    for name, some in watched.items():
        with saccade.watch(model, *some):
            more = peak_bytes(prefill, device) - memory
        added = (best[name] - best["plain"]) / best["attention"]
        rows.append(
            (
                f"watching {name}, {n} tokens",
                f"{best[name]:.2f} s, without {best['plain']:.2f} s (of which attention {best['attention']:.2f} s)",
                f"adds {added:.2f} times the attention's time (goal 2.5) and"
                f" {more / 1e6:.0f} MB (goal 150); all weights would be {4e-9 * layers * heads * n * n:.0f} GB",
            )
        )
    return rows


def caching() -> list[tuple[str, str, str]]:
    found = decoding(lambda: (SnapKV().policy(), BUDGET), prompt=PROMPT)
    return [
        (
            f"SnapKV, step after {PROMPT} tokens, {BUDGET} kept",
            f"{found['kept_ms']:.1f} ms, dense {found['dense_ms']:.1f} ms",
            f"{found['speedup']:.2f} times as fast (goal {SPEEDUP}),"
            f" {found['smaller']:.2f} times smaller (goal {SMALLER})",
        )
    ]


@torch.no_grad()
def stepping() -> list[tuple[str, str, str]]:
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

    layers, heads, key_heads, width, steps = 4, 8, 4, 32, 40
    config = LlamaConfig(
        vocab_size=260, hidden_size=heads * width, intermediate_size=512, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=key_heads, max_position_embeddings=32768,
    )  # fmt: skip
    torch.manual_seed(0)
    model, token = LlamaForCausalLM(config).eval(), torch.tensor([[5]])
    caches: dict[tuple[str, int, str], Any] = {}
    for case in itertools.product(("dynamic", "static"), (1024, 16384), ("softmax", "linear")):
        kind, n, _ = case
        caches[case] = DynamicCache() if kind == "dynamic" else StaticCache(config, max_cache_len=n + steps + 1)
        for layer in range(layers):
            caches[case].update(*torch.randn(2, 1, key_heads, n, width), layer)
    taken: dict[tuple[str, int, str], list[float]] = {case: [] for case in caches}
    program = LinearAttention(features.Elu1(), normalize=True)
    for _ in range(steps + 1):
        for case, cache in caches.items():
            with saccade.install(model, program) if case[2] == "linear" else contextlib.nullcontext():
                taken[case].append(seconds(lambda cache=cache: model(token, past_key_values=cache)))
    best = {case: statistics.median(times[1:]) for case, times in taken.items()}  # the first reads the keys once
    return [
        (
            f"a step after {n} tokens, linear attention, {kind} cache",
            f"{best[kind, n, 'linear'] * 1e3:.1f} ms, softmax {best[kind, n, 'softmax'] * 1e3:.1f} ms",
            f"{best[kind, n, 'linear'] / best[kind, n, 'softmax']:.2f} times its time",
        )
        for kind, n in itertools.product(("dynamic", "static"), (1024, 16384))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="run the groups whose name contains this word")
    options = parser.parse_args()
    table = Table("work", "seconds", "against the model as it is", title=f"{torch.get_num_threads()} threads")
    for group in (watching, caching, stepping):
        if options.only in group.__name__:
            for row in group():
                table.add_row(*row)
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
