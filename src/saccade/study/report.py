"""What a study found, for people: results.json, a table in the terminal, and one HTML file that needs nothing else."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import page, plots, tasks
from .cells import write_whole
from .models import environment
from .runner import SPEED, summarise

COLUMNS = (
    ("accuracy", "accuracy", "share of answers with every token right, mean over the recall tasks"),
    ("looked", "looked there", "share of answers for which a head has half of its attention where they already stand"),
    ("bits_per_byte", "bits/byte", "of held-out prose; lower is better"),
    ("output_error", "output error", "|program - dense| / |dense| of the attention output, mean over layers"),
    ("prefill_ratio", "prefill time", "times the untouched model's: median of the rounds, quartiles in brackets"),
    ("decode_ratio", "decode time", "per token on a filled cache, as a multiple of the untouched model's"),
    ("memory_ratio", "peak memory", "of the prefill call beside the weights, as a multiple of the untouched model's"),
    ("cache_ratio", "cache bytes", "held after the prefill, as a multiple of the untouched model's"),
)


def collect(study: Any, cells: Sequence[dict[str, Any]], command: str, seconds: float) -> dict[str, Any]:
    """Everything a run found, as it goes into results.json."""
    return {
        "command": command,
        "seconds": round(seconds, 1),
        "settings": asdict(study.settings),
        "environment": environment(study.model),
        "model": {
            "name": study.settings.model or "zoo: lm",
            "class": type(study.model).__name__,
            "parameters": sum(p.numel() for p in study.model.parameters()),
            "layers": study.model.config.num_hidden_layers,
            "heads": study.heads,
            "vocabulary": study.vocabulary.name,
            "fingerprint": study.fingerprint,
        },
        "systems": {e.name: {"title": e.title, "program": e.settings(study.heads)} for e in study.entries},
        "cells": list(cells),
        "summary": summarise(cells),
    }


def write(results: dict[str, Any], out: Path) -> tuple[Path, Path]:
    """Write results.json and report.html into a directory; their paths."""
    data, shown = out / "results.json", out / "report.html"
    write_whole(data, json.dumps(results, indent=1))
    write_whole(shown, html(results))
    return data, shown


def table(results: dict[str, Any]) -> Any:
    """The summary at the greatest length as a rich table."""
    from rich import box
    from rich.table import Table

    longest = max(row["length"] for row in results["summary"])
    shown = Table(
        title=f"{results['model']['name']}, {longest} tokens",
        caption="times, memory and cache: x dense in the same run (+- half the quartile range)",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    shown.add_column("system", no_wrap=True)
    columns = [(key, title) for key, title, _ in COLUMNS if key != "looked"]  # one more does not fit into 80 characters
    for _, title in columns:
        shown.add_column(title, justify="right")
    for row in results["summary"]:
        if row["length"] == longest:
            shown.add_row(row["system"], *(_brief(row[key], key) for key, _ in columns))
    return shown


def _brief(value: Any, key: str) -> str:
    if isinstance(value, dict):
        return f"{value['median']:.2f} +-{(value['high'] - value['low']) / 2:.2f}"
    return told(value, key)


def told(value: Any, key: str) -> str:
    """A value as people read it; a spread as median and quartiles."""
    if value is None:
        return "-"
    if isinstance(value, dict):
        return f"{value['median']:.2f} [{value['low']:.2f}, {value['high']:.2f}]"
    if key in ("accuracy", "looked"):
        return f"{value:.1%}"
    return f"{value:.2f}" if key.endswith("ratio") else f"{value:.3f}"


def middle(value: Any) -> Any:
    """The number to sort and plot by."""
    return value["median"] if isinstance(value, dict) else value


def html(results: dict[str, Any]) -> str:
    """The report as one page."""
    longest = max(row["length"] for row in results["summary"])
    figures = [
        _trade_off(results, longest, "accuracy", "higher"),
        _trade_off(results, longest, "bits_per_byte", "lower"),
        _over_length(results),
    ]
    return page.template("report.html.j2").render(
        r=results,
        columns=COLUMNS,
        told=told,
        middle=middle,
        longest=longest,
        figures=[f for f in figures if f],
        by_task=[c for c in results["cells"] if c["task"] != SPEED and "refused" not in c["result"]],
        speeds=[c for c in results["cells"] if c["task"] == SPEED and "refused" not in c["result"]],
        noise=spread_of_seconds(results),
        refused=[c for c in results["cells"] if "refused" in c["result"]],
    )


def _trade_off(results: dict[str, Any], length: int, quality: str, better: str) -> dict[str, str] | None:
    """Quality against prefill time, decode time and memory at one length."""
    rows = [r for r in results["summary"] if r["length"] == length and r[quality] is not None and r["prefill_ratio"]]
    if not rows:
        return None
    style = plots.looks(results["systems"])
    title = {"accuracy": "Accuracy on recall tasks", "bits_per_byte": "Bits per byte of prose"}[quality]
    costs = (
        ("prefill_ratio", "prefill time"),
        ("decode_ratio", "decode time per token"),
        ("memory_ratio", "peak memory of prefill"),
    )
    figure, axes = plots.figure(1, 3)
    for axis, (key, name) in zip(axes, costs, strict=True):
        for row in rows:
            x, spread = middle(row[key]), row[key]
            error = [[x - spread["low"]], [spread["high"] - x]] if isinstance(spread, dict) else None
            look = style[row["system"]]
            axis.errorbar(x, row[quality], xerr=error, ls="", ms=8, alpha=0.9, label=row["system"], **look)
        if quality == "accuracy":
            axis.set_ylim(-0.04, 1.04)
        axis.axvline(1, lw=0.8, ls=":", color=plots.INK)
        axis.set_xlabel(f"{name}, x dense")
        plots.log_if_wide(axis, [middle(row[key]) for row in rows])
    axes[0].set_ylabel(f"{title.split(' of ')[0].split(' on ')[0]} ({better} is better)")
    words = "; ".join(
        f"{r['system']}: {told(r[quality], quality)}, "
        + ", ".join(f"{name} {middle(r[key]):.2f}" for key, name in costs)
        for r in rows
    )
    told_words = f"{title} at {length} tokens, and cost as a multiple of dense. {words}."
    return plots.svg(figure, axes[0], f"{title} against cost, {length} tokens", told_words)


def _over_length(results: dict[str, Any]) -> dict[str, str]:
    """Accuracy of every task over the length, and bits per byte."""
    style = plots.looks(results["systems"])
    shown = [t for t in dict.fromkeys(c["task"] for c in results["cells"]) if t != SPEED]
    figure, axes = plots.figure(
        -(-len(shown) // 2) if len(shown) > 3 else 1, 2 if len(shown) > 3 else max(1, len(shown))
    )
    words = []
    for axis, task in zip(axes, shown, strict=False):
        name = "bits_per_byte" if task == tasks.TEXT else "accuracy"
        for system in results["systems"]:
            line = [
                (c["length"], c["result"][name], c["result"]["spread"])
                for c in results["cells"]
                if c["task"] == task and c["system"] == system and name in c["result"]
            ]
            if line:
                x, y, _ = zip(*line, strict=True)
                axis.plot(x, y, lw=1.6, ms=6, alpha=0.9, label=system, **style[system])
                words.append(f"{task}, {system}: " + ", ".join(f"{told(v, name)} at {n}" for n, v, _ in line))
        if task != tasks.TEXT:
            axis.set_ylim(-0.04, 1.04)
        axis.set_title(f"{task}: " + ("bits per byte" if task == tasks.TEXT else "accuracy"), fontsize=11)
        axis.set_xscale("log", base=2)
        lengths = sorted({c["length"] for c in results["cells"]})
        axis.set_xticks(lengths, [str(n) for n in lengths])
        axis.minorticks_off()
        axis.set_xlabel("tokens")
    for axis in axes[len(shown) :]:
        axis.set_visible(False)
    told_words = f"Quality of each task over the length. {'; '.join(words)}."
    return plots.svg(figure, axes[0], "Quality over length", told_words)


def spread_of_seconds(results: dict[str, Any]) -> float:
    """Median relative interquartile range of the dense prefill times: how quiet the machine was."""
    found = [c["result"]["prefill_s_dense"] for c in results["cells"] if "prefill_s_dense" in c["result"]]
    return statistics.median((s["high"] - s["low"]) / s["median"] for s in found) if found else 0.0
