"""Layers and small backbones that systems share: multi-head attention with its positions, gates and cache."""

from . import gates, positions
from .attention import KVCache, MultiHead, StateCache
from .backbones import GPT, Block, Encoder, EncoderDecoder, Stack, ViT

__all__ = [
    "GPT",
    "Block",
    "Encoder",
    "EncoderDecoder",
    "KVCache",
    "MultiHead",
    "Stack",
    "StateCache",
    "ViT",
    "gates",
    "positions",
]
