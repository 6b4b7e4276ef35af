"""Figures as SVG elements that stand in a page: readable in light and dark, and in words for those who cannot see."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from typing import Any

INK = "#010203"  # becomes currentColor, so that a picture is readable in light and dark
COLORS = ("#4c8bf5", "#e8710a", "#1e9e6a", "#d63384", "#9467bd", "#a08a00", "#17a2b8", "#d64545", "#8c6d5a", "#7f8c8d")
MARKERS = "osD^vP*X<>hpd8"


def looks(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """A colour and a marker for each name."""
    return {
        name: {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)]} for i, name in enumerate(names)
    }


def figure(rows: int, columns: int) -> tuple[Any, list[Any]]:
    """A figure of ``rows`` x ``columns`` axes, drawn in :data:`INK` on nothing."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 0.9 + 3.4 * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes:
        axis.set_facecolor("none")
        axis.grid(alpha=0.2, color=INK)
        axis.tick_params(colors=INK)
        axis.spines[:].set_color(INK)
        axis.spines[["top", "right"]].set_visible(False)
        for label in (axis.xaxis.label, axis.yaxis.label, axis.title):
            label.set_color(INK)
    return figure, axes


def log_if_wide(axis: Any, values: Sequence[float]) -> None:
    """A logarithmic axis with plain ticks where costs lie far apart."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    low, high = min([*values, 1.0]), max([*values, 1.0])
    if high / low > 4:
        axis.set_xscale("log")
        ticks = [t for t in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500) if low / 1.5 <= t <= high * 1.5]
        axis.xaxis.set_major_locator(FixedLocator(ticks))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    else:
        margin = 0.1 * max(high - low, 0.1)
        axis.set_xlim(low - margin, high + margin)


def svg(figure: Any, legend_of: Any, title: str, words: str) -> dict[str, str]:
    """A figure as an SVG element with selectable text: ``title``, ``words`` for those who cannot see it, ``svg``."""
    import matplotlib as mpl
    from markupsafe import escape

    handles, labels = legend_of.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(6, len(labels)), frameon=False, labelcolor=INK)
    drawn = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "font.family": "sans-serif"}):
        figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None})
    svg = drawn.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.S)
    svg = svg.replace(INK, "currentColor")
    name = re.sub(r"\W+", "-", title.lower())
    head = f'<svg role="img" aria-labelledby="{name}-title {name}-words" class="figure"'
    told_words = f'<title id="{name}-title">{escape(title)}</title><desc id="{name}-words">{escape(words)}</desc>'
    svg = re.sub(r"<svg", head, svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*pt"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*pt"', r"\1", svg, count=1)
    start = svg.index(">", svg.index("<svg")) + 1
    return {"title": title, "words": words, "svg": svg[:start] + told_words + svg[start:]}


def matrices(found: Sequence[Any], names: Sequence[str], title: str, words: str) -> dict[str, str]:
    """Tensors ``[rows, columns]`` in shades of their own, four beside each other, each under its name; as :func:`svg`.

    Names without a matrix are left out.
    """
    drawn, axes = figure(-(-len(found) // 4), 4)
    for axis, matrix, name in zip(axes, found, names, strict=False):
        axis.imshow(matrix.tolist(), aspect="auto")
        axis.set_title(name)
    for axis in axes[len(found) :]:
        axis.set_visible(False)
    return svg(drawn, axes[0], title, words)
