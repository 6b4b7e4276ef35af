"""saccade: attention as a small program that runs fast, trains, shows its weights and lets you change them."""

from typing import TYPE_CHECKING, Any

from . import nn
from .core import distributed, edits, masks, normalizers, scores, selectors, stats
from .core.attend import Explanation, attention, explain, weights
from .core.errors import SpecError, Unsupported
from .core.linear import LinearAttention, LinearState, linear_attention, linear_weights
from .core.masks import block_map
from .core.spec import Attention
from .core.tile import At, Region
from .hosts.handles import edit, install, watch

if TYPE_CHECKING:
    from .study.atlas import Atlas

__version__ = "0.1.0"


def report(model: Any, inputs: Any, **where: Any) -> "Atlas":
    """What every attention head of a model does on some inputs: see :func:`saccade.study.atlas.report`."""
    from .study.atlas import report  # needs the workbench's packages

    return report(model, inputs, **where)


__all__ = [
    "At",
    "Attention",
    "Explanation",
    "LinearAttention",
    "LinearState",
    "Region",
    "SpecError",
    "Unsupported",
    "attention",
    "block_map",
    "distributed",
    "edit",
    "edits",
    "explain",
    "install",
    "linear_attention",
    "linear_weights",
    "masks",
    "nn",
    "normalizers",
    "report",
    "scores",
    "selectors",
    "stats",
    "watch",
    "weights",
]
