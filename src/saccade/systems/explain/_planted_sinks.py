"""A model whose attention sinks are known, for they were put into its weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


@torch.no_grad()
def planted() -> Any:
    """A Llama of six layers in which token 1 is a sink from layer 1 on, 2 in layers 2 to 4, 3 in layers 3 and 4.

    Directions of the residual stream: 0 is the sink's, to which all queries look; 1 to 3 mark the tokens, 4 is in all.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    width, size, large = 32, 8, 20.0
    config = LlamaConfig(
        vocab_size=16, hidden_size=width, intermediate_size=4, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=4, head_dim=size, max_position_embeddings=512, rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.zero_()
    embedding = model.model.embed_tokens.weight
    embedding[:, 4] = 1
    for token in (1, 2, 3):
        embedding[token, token] = 2
    for layer in model.model.layers:
        still = torch.arange(4) * size + size // 2 - 1  # of each head the pair that turns the least
        layer.self_attn.q_proj.weight[still, 4] = 8.0
        layer.self_attn.k_proj.weight[still, 0] = 8.0
    # An MLP's unit for a token: silu(10 x) * x of the marked direction x, times what makes it the wanted number.
    for layer, token, before, wanted in ((0, 1, 0, large), (1, 2, 0, large), (2, 3, 0, large), (4, 2, large, -large),
                                         (4, 3, large, -large)):  # fmt: skip
        mlp, unit = model.model.layers[layer].mlp, token
        x = 2 / ((before**2 + 4 + 1) / width) ** 0.5
        mlp.gate_proj.weight[unit, token], mlp.up_proj.weight[unit, token] = 10, 1
        mlp.down_proj.weight[0, unit] = wanted / float(nn.functional.silu(torch.tensor(10 * x)) * x)
    return model
