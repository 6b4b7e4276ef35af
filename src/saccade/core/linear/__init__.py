"""Kernelised (linear) attention: a state instead of a score matrix, in three forms that agree."""

from . import features
from .attend import FORMS, linear_attention, linear_weights
from .spec import LinearAttention, LinearState

__all__ = ["FORMS", "LinearAttention", "LinearState", "features", "linear_attention", "linear_weights"]
