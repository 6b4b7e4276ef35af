"""Caches of fewer tokens beside NVIDIA's kvpress: the same random Llama, prompt, policy and threads, taking turns.

    python benchmarks/kvpress.py [--only "batch 1"] [--layers 4] [--key-heads 8] [--tokens 16384] [--json FILE]

SnapKV keeps 1920 of 16384 tokens. kvpress pins an older transformers: it runs in an environment of its own, which the
first run makes in ~/.cache/saccade/peers/kvpress (1.4 GB). Errors are of logits, against the same model with all tokens
held and those masked out that this side dropped (and padding), relative to the largest logit, by sample. "dropping" is
how far that reference is from dropping nothing, "text" the share of kept slots that are no padding, "shared" the share
of tokens that both keep.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

from saccade.study.caching import random_llama
from saccade.study.measure import Spread
from saccade.systems.cache.snapkv import BUDGET, PROMPT

HERE = Path(__file__).parent
PEER = Path.home() / ".cache/saccade/peers/kvpress"
WINDOW, TURNS, STEPS = 32, 8, 4
ABOUT = ("error", "dropping", "text", "shared")
CASES = {"batch 1": 1, "batch 2, a quarter of the first sample is padding": 2}


def environment() -> Path:
    """The interpreter of the peer's environment, made when it is not there or its pins changed."""
    pins, python, ready = HERE / "constraints-kvpress.txt", PEER / "bin/python", PEER / ".ready"
    wanted = pins.read_text()
    if python.exists() and ready.exists() and ready.read_text() == wanted:
        return python
    # torch first, as the Makefile does: with it installed nothing else pulls a CUDA build.
    torch_pin, peer = (next(p for p in wanted.split() if p.startswith(name + "==")) for name in ("torch", "kvpress"))
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    for what, command in (
        ("python", [sys.executable, "-m", "venv", "--clear", str(PEER)]),
        (torch_pin, [*pip, torch_pin]),
        (peer, [*pip, "--constraint", str(pins), peer]),
    ):
        print(f"{PEER}: installing {what}", flush=True)
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            why = " ".join((done.stderr or done.stdout).strip().splitlines()[-1:])
            raise SystemExit(f"kvpress.py: the peer's environment {PEER} cannot be made: no {what}: {why}")
    ready.write_text(wanted)
    return python


class Side:
    """A process in an environment."""

    def __init__(self, python: str, name: str, folder: str, budget: int):
        command = [python, "-I", str(HERE / "kvpress_side.py"), name, folder, str(WINDOW), str(budget)]
        self.name, self.process = name, subprocess.Popen(command, stdin=-1, stdout=-1, text=True)

    def __call__(self, *what: Any) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps(what), file=self.process.stdin, flush=True)
        if not (line := self.process.stdout.readline()):
            raise SystemExit(f"kvpress.py: the side of {self.name} ended when told {what}; its error is above")
        return json.loads(line)


def measure(sides: list[Side], folder: str, prompt: int, batch: int) -> list[dict[str, Any]]:
    """One case: dense and kept of both sides, prefill and steps in turn."""
    padding = prompt // 4 if batch > 1 else 0
    versions = {side.name: side("start", batch, prompt, padding) for side in sides}
    rows = []
    for which, tool in (("dense", "transformers"), ("kept", "")):
        for side in sides:
            row = {"side": side, "which": which, "name": versions[side.name][tool or side.name], "steps": []}
            row["prefill"] = side("prefill", which)
            print(f"  {row['name']}, {which}: prefill {row['prefill'][0]:.1f} s", flush=True)
            rows.append(row)
    for turn in range(TURNS + 1):
        for row in rows:
            seen = row["side"]("steps", row["which"], STEPS)
            row["steps"] += seen if turn else []  # the first turn warms up
    print("  steps done; judging", flush=True)
    found = {side.name: side("figures") for side in sides}
    for row in rows:
        row["side"] = row["side"].name
        of, step = found[row["side"]], Spread.of(row["steps"])
        row["tokens_per_s"] = [batch / s for s in (step.median, step.high, step.low)]
        row["bytes"], row["smaller"] = (of[w + "_bytes"] for w in (row["which"], "dense"))
        row["smaller"] /= row["bytes"]
        row |= {k: v for k, v in of.items() if row["which"] == "kept" and "bytes" not in k}
    ours, theirs = (torch.load(f"{folder}/{side.name}.pt") for side in sides)
    both = sum((a & b).sum((1, 2)) for a, b in zip(ours, theirs, strict=True))
    rows[2]["shared"] = (both / sum(a.sum((1, 2)) for a in ours)).tolist()
    return rows


def show(table: Table, rows: list[dict[str, Any]]) -> None:
    for row in rows:

        def each(name: str, form: str, row: dict[str, Any] = row) -> str:
            return ", ".join(format(x, form) for x in row.get(name, ()))

        median, low, high = row["tokens_per_s"]
        table.add_row(
            row["name"], "{:.1f} ({:.0f})".format(*row["prefill"]), f"{median:.1f} ({low:.1f} to {high:.1f})",
            f"{row['bytes'] / 1e6:.1f}", f"{row['smaller']:.2f}", each("error", ".1e"), each("dropping", ".2f"),
            each("text", ".0%"), each("shared", ".0%"),
        )  # fmt: skip
        if "error_no_mask" in row:
            table.add_row("  no mask in its steps", *[""] * 4, each("error_no_mask", ".1e"))
    table.add_section()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="run the cases whose name contains this")
    parser.add_argument("--key-heads", type=int, default=8, help="of 8 heads; fewer are shared by groups")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=PROMPT, help="of the prompt; fewer to try the script")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    disable_progress_bar()
    python, kept = environment(), options.tokens * BUDGET // PROMPT
    table = Table(
        title=f"{kept} of {options.tokens} tokens, {options.layers} layers, {torch.get_num_threads()} threads"
    )
    for name in ("cache", "prefill s (core-s)", "decode tokens/s", "MB", "smaller", *ABOUT):
        table.add_column(name)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        config = random_llama(PROMPT).config
        config.num_key_value_heads, config.num_hidden_layers = options.key_heads, options.layers
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        for p in model.parameters():  # sharp enough that what is attended to matters
            p.data.mul_(3 if p.ndim > 1 else 1)
        model.save_pretrained(folder)
        sides = [Side(p, n, folder, kept) for p, n in ((sys.executable, "saccade"), (str(python), "kvpress"))]
        try:
            for case in (c for c in CASES if options.only in c):
                print(case, flush=True)
                found[case] = measure(sides, folder, options.tokens, CASES[case])
                table.add_row(f"[bold]{case}[/]")
                show(table, found[case])
        finally:
            for side in sides:
                side.process.kill()
    Console(width=160).print(table)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
