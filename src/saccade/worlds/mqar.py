"""Multi-query associative recall, as Zoology defines it: keys with their values, then the keys again in random places.

    inputs   k1 v1 k2 v2 ...   .  k2  .  .  .  k1  .  .
    labels    .  .  .  . ...   .  v2  .  .  .  v1  .  .

Keys are drawn from 1 .. V/2 - 1, values from V/2 .. V - 1, neither twice. Query j stands 2 g_j tokens behind the
pairs; the gaps g are drawn without replacement from 0 .. G - 1 (G = half of the tokens left) with probability
proportional to power_a * (g + 1) ** (power_a - 1): one far away is rare. Every other token is random.

Paper: Zoology, arXiv:2312.04927. Code: https://github.com/HazyResearch/zoology (zoology/data/multiquery_ar.py)

Differs: examples are drawn one by one from a stream; the settings are Zoology's, by their names there, without
``num_passes`` (always 1).
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from .batches import Labelled, batch, expect, labelled

__all__ = ["batch", "mqar"]


def mqar(
    length: int,
    seed: int | str,
    *,
    vocab_size: int = 8192,
    num_kv_pairs: int = 8,
    power_a: float = 0.01,
    random_non_queries: bool = True,
) -> Iterator[Labelled]:
    """Endless sequences of ``length`` tokens, all keys asked once; the evidence is the value behind the key.

    Raises:
        ValueError: the pairs and their queries do not fit, the length is odd, or the vocabulary not larger than it.
    """
    expect("mqar", "num_kv_pairs", num_kv_pairs, 1, length // 4)
    expect("mqar", "vocab_size", vocab_size, length + 1)
    if length % 2:
        raise ValueError(f"mqar: expected an even length, got {length}: ask for {length + 1}")
    rng = random.Random(f"mqar/{seed}")
    behind, half = 2 * num_kv_pairs, vocab_size // 2
    law = [power_a * gap ** (power_a - 1) for gap in range(1, (length - behind) // 2 + 1)]
    while True:
        keys = rng.sample(range(1, half), num_kv_pairs)
        values = rng.sample(range(half, vocab_size), num_kv_pairs)
        inputs = rng.choices(range(vocab_size), k=length) if random_non_queries else [0] * length
        inputs[0:behind:2], inputs[1:behind:2] = keys, values
        asked = {}
        for i, gap in enumerate(without_replacement(law, num_kv_pairs, rng)):
            place = behind + 2 * gap
            inputs[place] = keys[i]
            asked[place] = (values[i], 2 * i + 1)
        yield labelled(inputs, asked)


def without_replacement(weights: list[float], count: int, rng: random.Random) -> list[int]:
    """``count`` different indices, one after the other, each in proportion to the weights of those left."""
    # Exponential clocks of these rates ring in just that order (Efraimidis and Spirakis).
    rings = [rng.expovariate(weight) for weight in weights]
    return sorted(range(len(weights)), key=rings.__getitem__)[:count]
