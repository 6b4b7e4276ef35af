"""The model under study: loading it, refusing what cannot fit, and what else its numbers depend on."""

from __future__ import annotations

import hashlib
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..core.errors import SpecError


def load(where: str | None) -> tuple[Any, Any]:
    """A causal language model and its tokenizer (``None`` if it has none); the network is used for a Hub id alone.

    Raises:
        SpecError: there is no such model, or it is not a causal language model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from .. import zoo

    if where is None:
        try:
            where = str(zoo.path("lm"))
        except ValueError as error:
            raise SpecError(f"{error}, or name a model with --model") from error
    local = Path(where).exists()
    if local and not (Path(where) / "config.json").is_file():
        raise SpecError(f"{where} holds no transformers model: there is no config.json")
    if not local and (where.count("/") != 1 or where[0] in "./~"):
        raise SpecError(f"there is no model directory {where}")
    try:
        config = AutoConfig.from_pretrained(where, local_files_only=local)
        heads = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
        if not any(name in heads for name in config.architectures or ()):
            kind = ", ".join(config.architectures or ()) or config.model_type
            raise SpecError(f"{where} holds a {kind}, which is not a causal language model")
        dtype = "auto" if torch.cuda.is_available() else torch.float32
        model = AutoModelForCausalLM.from_pretrained(where, local_files_only=local, dtype=dtype).eval()
    except SpecError:
        raise
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise SpecError(f"the model {where} cannot be loaded: {reason}") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, local_files_only=local)
    except (OSError, ValueError, KeyError, AttributeError):
        tokenizer = None
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def fits(model: Any, lengths: Sequence[int]) -> None:
    """Refuse lengths beyond the model's context or this machine's memory.

    Raises:
        SpecError: with both numbers.
    """
    config, longest = model.config.get_text_config(), max(lengths)
    context = getattr(config, "max_position_embeddings", None)
    if context is not None and longest > context:
        raise SpecError(f"length {longest} is beyond the model's context of {context} tokens")
    wide = model.dtype.itemsize
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    # Logits as they come and in float32; activations of a layer; four caches (two ways, each with a copy).
    per_token = config.vocab_size * (wide + 8) + (8 * config.hidden_size + 3 * inner) * wide
    per_token += 4 * 2 * config.num_hidden_layers * config.hidden_size * wide
    free = torch.cuda.mem_get_info()[0] if model.device.type == "cuda" else _free_memory()
    if per_token * longest > free:
        raise SpecError(
            f"length {longest} needs about {per_token * longest / 2**30:.1f} GiB beside the model, and"
            f" {free / 2**30:.1f} GiB are free"
        )


def _free_memory() -> int:
    info = Path("/proc/meminfo")
    if info.exists():
        lines = dict(line.split(":") for line in info.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def environment(model: Any) -> dict[str, Any]:
    """What else the numbers depend on: machine, threads, versions, and of a model (``None``: none) device and dtype."""
    import transformers

    from .claims import machine

    where = {} if model is None else {"device": str(model.device), "dtype": str(model.dtype).removeprefix("torch.")}
    return {
        "machine": machine(),
        "system": platform.platform(),
        **where,
        "threads": torch.get_num_threads(),
        "versions": {
            "saccade": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": sys.version.split()[0],
        },
    }


def fingerprint(model: Any) -> str:
    """A hash of the configuration, and of every tensor the shape, the sum and a sample of values."""
    state = hashlib.sha256(model.config.to_json_string(use_diff=False).encode())
    for name, tensor in model.state_dict().items():
        flat = tensor.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 1024)].float().cpu()
        state.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}{float(flat.float().sum())}".encode())
        state.update(sample.numpy().tobytes())
    return state.hexdigest()[:16]
