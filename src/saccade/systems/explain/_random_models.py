"""Small models of transformers with random weights, sharp enough that their heads differ."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

VOCABULARY, TOKENS = 260, 1024  # and the longest text


def encoder() -> Any:
    """A BERT."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=TOKENS,
    )  # fmt: skip
    return _sharp(lambda: BertModel(config))


def encoder_decoder() -> Any:
    """A BART."""
    from transformers import BartConfig, BartModel

    config = BartConfig(
        vocab_size=VOCABULARY, d_model=32, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=48,
        decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48, max_position_embeddings=TOKENS,
    )  # fmt: skip
    return _sharp(lambda: BartModel(config))


def _sharp(make: Callable[[], Any]) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make().eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(8)
    return model
