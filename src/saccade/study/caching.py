"""What the claims of caches measure: decoding speed and bytes, needles found, and the age of what is kept."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ..cache import Cache, Policy
from ..worlds import recall
from ..worlds.text import heldout
from .probes import embedded

STEPS = 16


def random_llama(length: int) -> Any:
    """A random LlamaForCausalLM whose decoding at long contexts is bound by the cache: 4 layers, 8 heads of 64."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=260, hidden_size=512, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8,
            num_key_value_heads=8, max_position_embeddings=length + 256,
        )
    ).eval()  # fmt: skip


@torch.no_grad()
def decoding(make: Callable[[], tuple[Policy, int]], prompt: int, batch: int = 1) -> dict[str, float]:
    """Seconds of a step and bytes of the cache after a prompt, with a policy and without, steps taking turns.

    The prompt is fed in chunks of 2048, and its bytes are counted after the last step. Without a policy the model is
    transformers' own, with sdpa and a DynamicCache.
    """
    from transformers import DynamicCache

    model = random_llama(prompt)
    tokens = torch.randint(0, 256, (batch, prompt), generator=torch.Generator().manual_seed(0))
    policy, budget = make()
    seconds: dict[str, list[float]] = {"dense": [], "kept": []}
    plain, held = DynamicCache(), Cache(model, policy, budget=budget)
    for piece in tokens.split(2048, 1):
        model(piece, past_key_values=plain, logits_to_keep=1)
    with held:
        model(tokens, past_key_values=held, logits_to_keep=1)
    step = tokens[:, :1]

    def timed(name: str, cache: Any) -> None:
        start = time.perf_counter()
        model(step, past_key_values=cache)
        seconds[name].append(time.perf_counter() - start)

    for _ in range(STEPS + 1):
        timed("dense", plain)
        with held:
            timed("kept", held)
    dense, kept = (statistics.median(s[1:]) for s in seconds.values())
    stored: Any = plain.layers
    whole = sum(layer.keys.nbytes + layer.values.nbytes for layer in stored)
    return {
        "speedup": round(dense / kept, 3), "smaller": round(whole / held.nbytes, 3), "dense_ms": round(1e3 * dense, 3),
        "kept_ms": round(1e3 * kept, 3), "dense_bytes": whole, "kept_bytes": held.nbytes,
    }  # fmt: skip


@torch.no_grad()
def needles(
    make: Callable[[int], tuple[Policy, int]], lengths: tuple[int, ...] = (512, 1024, 2048), examples: int = 12
) -> dict[str, float]:
    """Share of needles answered by the embedded model, with a policy (``make(length)``) and dense.

    The page with its question is the prompt; the answer is decoded, each byte given the true ones before it.
    """
    model = embedded()
    right: dict[str, list[bool]] = {"dense": [], "kept": []}
    for length in lengths:
        for example in islice(recall.needle(length, 5), examples):
            answer = example.answers[0]
            policy, budget = make(length)
            for name, cache in (("dense", Cache(model)), ("kept", Cache(model, policy, budget=budget))):
                with cache:
                    right[name].append(_answers(model, cache, example.tokens, answer.start, answer.stop))
    return {name: sum(r) / len(r) for name, r in right.items()}


def _answers(model: Any, cache: Cache, tokens: Tensor, start: int, stop: int) -> bool:
    logits = model(tokens[None, :start], past_key_values=cache, logits_to_keep=1).logits[0, -1]
    for i in range(start, stop):
        if int(logits.argmax()) != int(tokens[i]):
            return False
        if i + 1 < stop:
            logits = model(tokens[None, i : i + 1], past_key_values=cache).logits[0, -1]
    return True


@torch.no_grad()
def ages(make: Callable[[], Policy], length: int = 1024, budget: int = 256) -> float:
    """Mean place in the text (0 the first token, 1 the last) of the tokens that the embedded model's cache keeps."""
    model = embedded()
    tokens = torch.tensor([[256, *heldout()[5000 : 5000 + length - 1]]])
    with Cache(model, make(), budget=budget) as cache:
        model(tokens, past_key_values=cache, logits_to_keep=1)
    places = [s.positions.double().mean() / (length - 1) for layer in cache.held for s in layer.segments]
    return float(torch.stack(places).mean())
