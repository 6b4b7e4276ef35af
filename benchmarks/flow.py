"""Rollout and relevance of a long prompt's last query through all layers of the embedded model, and its head atlas.

    python benchmarks/flow.py [--tokens 16384] [--only rollout]

Each beside the model's own forward (for relevance, forward and backward) of the same prompt; memory is what the
call's tensors held at most beside the model, counted in a second call.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from saccade import report
from saccade.hosts.flow import keep
from saccade.study.measure import peak_bytes
from saccade.study.probes import embedded
from saccade.worlds.text import text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--only", default="", help="one of the rows, by its name")
    options = parser.parse_args()
    model, n = embedded(), options.tokens
    tokens = next(text(n, "flow")).tokens[None]

    def forward() -> Any:
        return model(tokens, use_cache=False, logits_to_keep=1).logits

    @torch.no_grad()
    def plain() -> None:
        forward()

    def trained() -> None:
        torch.autograd.grad(forward().max(), list(model.parameters()))

    @torch.no_grad()
    def rollout() -> None:
        with keep(model) as run:
            forward()
        run.rollout([-1])

    def relevance() -> None:
        with keep(model) as run:
            run.relevance(forward().max(), [-1])

    work: dict[str, Callable[[], Any]] = {
        "forward": plain, "rollout": rollout, "forward and backward": trained, "relevance": relevance,
        "head atlas": lambda: report(model, tokens),
    }  # fmt: skip
    table = Table("work", "CPU seconds", "most memory, MB", title=f"{n} tokens, {torch.get_num_threads()} threads")
    for name, call in work.items():
        if options.only not in ("", name):
            continue
        start = time.process_time()
        call()
        seconds = time.process_time() - start
        table.add_row(name, f"{seconds:.1f}", f"{peak_bytes(call, torch.device('cpu')) / 1e6:.0f}")
    layers, heads = model.config.num_hidden_layers, model.config.num_attention_heads
    table.caption = f"all weights would be {4e-9 * layers * heads * n * n:.1f} GB"
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
