"""One small model of every family that must be hosted, freshly initialised but with attention that matters."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf

VOCABULARY, LENGTH = 96, 24
TEXT = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
ENCODER = {k: v for k, v in TEXT.items() if k not in ("num_key_value_heads", "head_dim")}
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip
SLIDING = {"sliding_window": 6}


def tokens(batch: int = 2) -> torch.Tensor:
    return torch.randint(3, VOCABULARY - 6, (batch, LENGTH), generator=torch.Generator().manual_seed(1))


def _pixels(*size: int) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(2))


def _text() -> dict[str, Any]:
    return {"input_ids": tokens(), "attention_mask": torch.ones(2, LENGTH, dtype=torch.int64)}


def _pair() -> dict[str, Any]:
    return _text() | {"decoder_input_ids": tokens()[:, :9]}


def _llava() -> dict[str, Any]:
    ids = tokens()
    ids[:, 2:18] = VOCABULARY - 1  # 16 patches
    return _text() | {"input_ids": ids, "pixel_values": _pixels(2, 3, 16, 16)}


def _qwen2_vl() -> dict[str, Any]:
    ids = tokens()
    ids[:, 1], ids[:, 2:6], ids[:, 6] = VOCABULARY - 3, VOCABULARY - 1, VOCABULARY - 2  # 16 patches, 2 x 2 to a token
    kinds = (ids == VOCABULARY - 1).long()
    return _text() | {
        "input_ids": ids, "pixel_values": _pixels(32, 3 * 2 * 4 * 4), "image_grid_thw": torch.tensor([[1, 4, 4]] * 2),
        "mm_token_type_ids": kinds,
    }  # fmt: skip


def _make_qwen2_vl() -> Any:
    config = tf.Qwen2VLConfig(
        text_config=TEXT
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}},
        vision_config={
            "depth": 2, "embed_dim": 32, "num_heads": 4, "hidden_size": 32, "patch_size": 4, "temporal_patch_size": 2,
            "spatial_merge_size": 2, "mlp_ratio": 2,
        },
        image_token_id=VOCABULARY - 1, vision_start_token_id=VOCABULARY - 3, vision_end_token_id=VOCABULARY - 2,
        video_token_id=VOCABULARY - 4,
    )  # fmt: skip
    return tf.Qwen2VLForConditionalGeneration(config)


MODELS = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT)),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**TEXT)),
    "gemma2": lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**TEXT, **SLIDING, attn_logit_softcapping=2.0)),
    "gemma3": lambda: tf.Gemma3ForCausalLM(
        tf.Gemma3TextConfig(**TEXT, **SLIDING, layer_types=["sliding_attention", "full_attention"])
    ),
    "gpt_oss": lambda: tf.GptOssForCausalLM(
        tf.GptOssConfig(
            **TEXT, **SLIDING, num_local_experts=2, num_experts_per_tok=1,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        )
    ),
    "gpt2": lambda: tf.GPT2LMHeadModel(
        tf.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=1)
    ),
    "bert": lambda: tf.BertForMaskedLM(tf.BertConfig(**ENCODER)),
    "modernbert": lambda: tf.ModernBertForMaskedLM(
        tf.ModernBertConfig(**ENCODER, local_attention=8, global_attn_every_n_layers=2, cls_token_id=1, sep_token_id=2)
    ),
    "t5": lambda: tf.T5ForConditionalGeneration(
        tf.T5Config(
            vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
        )
    ),
    "bart": lambda: tf.BartForConditionalGeneration(
        tf.BartConfig(
            vocab_size=VOCABULARY, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=128,
            pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=None,
        )
    ),
    "whisper": lambda: tf.WhisperForConditionalGeneration(
        tf.WhisperConfig(
            vocab_size=VOCABULARY, num_mel_bins=8, d_model=32, encoder_layers=2, decoder_layers=2,
            encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48,
            max_source_positions=20, max_target_positions=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            decoder_start_token_id=3, suppress_tokens=None, begin_suppress_tokens=None,
        )
    ),
    "vit": lambda: tf.ViTForImageClassification(tf.ViTConfig(**VISION)),
    "clip": lambda: tf.CLIPModel(tf.CLIPConfig(text_config=ENCODER, vision_config=VISION, projection_dim=16)),
    "llava": lambda: tf.LlavaForConditionalGeneration(
        tf.LlavaConfig(
            text_config=tf.LlamaConfig(**TEXT), vision_config=tf.CLIPVisionConfig(**VISION),
            image_token_index=VOCABULARY - 1, vision_feature_layer=-1,
        )
    ),
    "qwen2_vl": _make_qwen2_vl,
}  # fmt: skip
INPUTS = {
    "t5": _pair,
    "bart": _pair,
    "whisper": lambda: {"input_features": _pixels(2, 8, 40), "decoder_input_ids": tokens()[:, :9]},
    "vit": lambda: {"pixel_values": _pixels(2, 3, 16, 16)},
    "clip": lambda: _text() | {"pixel_values": _pixels(2, 3, 16, 16)},
    "llava": _llava,
    "qwen2_vl": _qwen2_vl,
}
GENERATE = [name for name in MODELS if name not in ("bert", "modernbert", "vit", "clip")]
DECODERS = ["llama", "qwen3", "gemma2", "gemma3", "gpt_oss", "gpt2"]


def make(family: str, native: str = "sdpa") -> Any:
    """The model, with attention sharp enough that a wrong mask shows."""
    torch.manual_seed(0)
    model = MODELS[family]().eval()
    for name, p in model.named_parameters():
        if "sinks" in name:
            p.data.normal_()
        elif p.ndim > 1 and not any(part in name for part in ("norm", "shared", "embed_tokens")):
            p.data.mul_(4)
    if family in ("gpt_oss", "gemma2"):
        native = "eager"  # sdpa takes no sink logits and no soft cap
    model.set_attn_implementation(native)
    return model


def inputs(family: str) -> dict[str, Any]:
    return INPUTS.get(family, _text)()


def answer(model: Any, given: dict[str, Any], **options: Any) -> torch.Tensor:
    """What the model computes: its logits, or CLIP's similarities."""
    out = model(**given, **options)
    return out.logits_per_image if hasattr(out, "logits_per_image") else out.logits
