"""Tasks: recall worlds and held-out prose, read through any model's own vocabulary, and scored under teacher forcing.

An answer is right if every token of it is the argmax, the true tokens before it given; prose is scored in bits per
byte of the text that the tokens stand for, so that vocabularies can be compared.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.errors import SpecError
from ..core.stats import RegionMass
from ..hosts.handles import watch
from ..worlds import recall
from ..worlds.text import BOS, Example, decode, encode, heldout, text

TEXT = "text"
NAMES = (TEXT, *recall.WORLDS)
DEFAULT = (TEXT, "needle", "recall", "copy")


@dataclass(frozen=True)
class Sample:
    """tokens: int64 [N]. answers: token ranges that must be predicted. size: bytes that tokens[1:] stand for.

    evidence: for each answer the range where it already stands.
    """

    tokens: Tensor
    answers: tuple[tuple[int, int], ...]
    size: int
    evidence: tuple[tuple[int, int], ...] = ()


class Bytes:
    """A vocabulary of bytes with BOS at 256, as the zoo's model has."""

    name = "bytes"

    def samples(self, task: str, length: int, seed: int, count: int) -> list[Sample]:
        """``count`` samples of exactly ``length`` tokens."""
        return [
            Sample(e.tokens, said, length - 1, stands)
            for e in islice(_examples(task, length, seed), count)
            for said, stands in [_ranges(e)]
        ]


def _ranges(example: Example) -> tuple[tuple[tuple[int, int], ...], tuple[tuple[int, int], ...]]:
    """Of each answer: where it is to be said, and where it stands."""
    said = tuple((a.start, a.stop) for a in example.answers)
    return said, tuple((a.evidence_start, a.evidence_stop) for a in example.answers)


class Tokens:
    """The vocabulary of a tokenizer that can say which characters each token stands for."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.name = type(tokenizer).__name__
        if not tokenizer.is_fast:
            raise SpecError(f"the model's {self.name} does not tell which characters a token stands for")

    def samples(self, task: str, length: int, seed: int, count: int) -> list[Sample]:
        """``count`` samples of at most ``length`` tokens (prose: exactly)."""
        if task == TEXT:
            return list(islice(self._prose(length, seed), count))
        # Bytes per token differ from task to task: shrink the pages until all of them fit.
        size = 6 * length
        for _ in range(20):
            found = [self._read(e) for e in islice(_examples(task, size, seed), count)]
            longest = max(len(s.tokens) for s in found)
            if longest <= length:
                return found
            size = min(size - 1, int(size * length / longest * 0.99))
        raise SpecError(f"{task} does not fit into {length} tokens of {self.name}")

    @cached_property
    def _heldout(self) -> tuple[list[int], list[tuple[int, int]]]:
        read = self.tokenizer(heldout().decode(), add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return read["input_ids"], read["offset_mapping"]

    @property
    def _first(self) -> list[int]:
        bos = self.tokenizer.bos_token_id
        return [] if bos is None else [bos]

    def _prose(self, length: int, seed: int) -> Iterator[Sample]:
        ids, places = self._heldout
        body = length - len(self._first)
        if not 1 < body <= len(ids):
            raise SpecError(f"text: length must lie in 2..{len(ids) + len(self._first)} for {self.name}; got {length}")
        rng = random.Random(f"text/{seed}")
        while True:
            start = rng.randint(0, len(ids) - body)
            begin = start if self._first else start + 1  # without BOS nothing predicts the first token
            size = places[start + body - 1][1] - places[begin][0]
            yield Sample(torch.tensor(self._first + ids[start : start + body]), (), size)

    def _read(self, example: Example) -> Sample:
        page = decode(example.tokens)
        read = self.tokenizer(page, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        before = len(self._first)

        def ranges(places: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:  # in bytes, of which BOS was one
            found = []
            for start, stop in places:
                hit = [i for i, (x, y) in enumerate(read["offset_mapping"]) if x < stop - 1 and y > start - 1]
                found.append((hit[0] + before, hit[-1] + 1 + before))
            return tuple(found)

        said, stands = map(ranges, _ranges(example))
        return Sample(torch.tensor(self._first + read["input_ids"]), said, len(page), stands)


def vocabulary(model: Any, tokenizer: Any) -> Bytes | Tokens:
    """How a model reads text: as bytes if its ids are bytes, else through its tokenizer.

    Raises:
        SpecError: it has no tokenizer and no room for bytes and BOS.
    """
    probe = "Pass 37;"
    if tokenizer is None:
        if model.config.get_text_config().vocab_size <= BOS:
            raise SpecError("the model has no tokenizer and fewer than 257 tokens, so text cannot be shown to it")
        return Bytes()
    if tokenizer(probe)["input_ids"] == encode(probe.encode()).tolist():
        return Bytes()
    return Tokens(tokenizer)


def _examples(task: str, length: int, seed: int) -> Iterator[Example]:
    if task == TEXT:
        return text(length, seed)
    make: Callable[..., Iterator[Example]] = recall.WORLDS[task]
    return make(length, seed)


LOOKED = 0.5  # share of a head's attention that lies on the evidence while it looks there
PIECES = 8  # that prose is read in where a cache drops tokens


@torch.no_grad()
def score(model: Any, sample: Sample, cache: Any = None, watched: bool = False) -> dict[str, float]:
    """One sample: ``right`` and ``asked`` answers, or (prose) ``bits`` and ``bytes``.

    ``watched``: also ``looked``, for how many answers some head has at least half of its attention on the evidence,
    on average over the tokens of the answer as they are predicted (not with a cache).

    With a cache (which drops tokens after a call) the page up to the first answer is the prompt and the rest comes on
    top of what is held; prose is read in eight pieces.
    """
    tokens = sample.tokens[None].to(model.device)
    looked = None
    if cache is None and watched and sample.answers:
        with watch(model, _on_evidence(sample, tokens.device), kind="self") as watching:
            logits = model(input_ids=tokens, use_cache=False).logits[0, :-1]
        mass = torch.cat([told["region_mass"]["evidence"][0] for told in watching.seen.values()])  # [heads of all, N]
        most = [float(mass[:, start - 1 : stop - 1].mean(-1).max()) for start, stop in sample.answers]
        looked = sum(share >= LOOKED for share in most)
    elif cache is None:
        logits = model(input_ids=tokens, use_cache=False).logits[0, :-1]
    else:
        first = min((start for start, _ in sample.answers), default=0)
        parts = [tokens[:, :first], tokens[:, first:]] if first else tokens.tensor_split(PIECES, 1)
        logits = torch.cat([model(input_ids=p, past_key_values=cache).logits[0] for p in parts])[:-1]
    if not sample.answers:
        nats = F.cross_entropy(logits.float(), tokens[0, 1:], reduction="sum")
        return {"bits": float(nats) / math.log(2), "bytes": sample.size}
    hit = logits.argmax(-1) == tokens[0, 1:]
    right = [bool(hit[start - 1 : stop - 1].all()) for start, stop in sample.answers]
    found: dict[str, float] = {"right": sum(right), "asked": len(right)}
    if looked is not None:
        found["looked"] = looked
    return found


def _on_evidence(sample: Sample, device: torch.device) -> RegionMass:
    """For each query that predicts a token of an answer: its mass where that answer already stands."""
    low, high = torch.zeros(2, len(sample.tokens), dtype=torch.long, device=device)
    for (start, stop), (first, last) in zip(sample.answers, sample.evidence, strict=True):
        low[start - 1 : stop - 1], high[start - 1 : stop - 1] = first, last
    return RegionMass({"evidence": lambda b, h, q, k: (k >= low[q]) & (k < high[q])})
