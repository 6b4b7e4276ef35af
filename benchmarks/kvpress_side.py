"""One side of kvpress.py: runs in the environment of saccade or of kvpress, and does what it is told, line by line.

python -I kvpress_side.py saccade|kvpress FOLDER WINDOW BUDGET    (-I: or this folder would hide the package kvpress)
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from importlib.metadata import version
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

JUDGED = 4  # steps whose logits are compared


def stored(thing: Any, seen: dict[int, Any], storages: dict[int, int]) -> int:
    """Bytes of every storage that a cache really holds, each once."""
    if id(thing) not in seen and not isinstance(thing, (nn.Module, type)):
        seen[id(thing)] = thing
        if isinstance(thing, Tensor):
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
        for part in thing if isinstance(thing, (list, tuple)) else list(getattr(thing, "__dict__", {}).values()):
            stored(part, seen, storages)
    return sum(storages.values())


class Side:
    """A model, its dense cache, and its cache that holds fewer tokens."""

    def __init__(self, name: str, folder: str, window: str, budget: str):
        self.name, self.folder, self.window, self.budget = name, folder, int(window), int(budget)
        self.model: Any = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def start(self, batch: int, length: int, padding: int) -> dict[str, str]:
        """A prompt of random tokens; the first sample of a batch has padding to its left."""
        self.tokens = torch.randint(3, 260, (batch, length + 64), generator=torch.Generator().manual_seed(0))
        self.real = torch.ones_like(self.tokens, dtype=torch.bool)
        self.real[0, :padding] = False
        self.length, self.caches, self.logits = length, {}, {"dense": [], "kept": []}
        return {of: f"{of} {version(of)}" for of in ("transformers", self.name)}

    def call(self, cache: Any, start: int, stop: int, masked: bool = True) -> Tensor:
        """What ``generate`` hands to the model."""
        places = (self.real.cumsum(1) - 1).clamp(min=0)[:, start:stop]
        padded = masked and not bool(self.real.all())
        more = {"cache_position": torch.arange(start, stop)} if self.name == "kvpress" else {}  # gone in newer ones
        return self.model(
            self.tokens[:, start:stop], attention_mask=self.real[:, :stop].long() if padded else None,
            position_ids=places if start or padded else None, past_key_values=cache, logits_to_keep=1, **more,
        ).logits[:, -1]  # fmt: skip

    def prefill(self, which: str) -> list[float]:
        """Seconds, and seconds of processor time."""
        self.caches[which] = cache = DynamicCache() if which == "dense" else self.held()
        with contextlib.nullcontext() if which == "dense" else self.pressing():
            start = time.perf_counter(), time.process_time()
            self.call(cache, 0, self.length)
            return [time.perf_counter() - start[0], time.process_time() - start[1]]

    def steps(self, which: str, count: int) -> list[float]:
        found = []
        for _ in range(count):
            at = self.length + len(self.logits[which])
            with self.caches[which] if which == "kept" and self.name == "saccade" else contextlib.nullcontext():
                start = time.perf_counter()
                self.logits[which].append(self.call(self.caches[which], at, at + 1))
                found.append(time.perf_counter() - start)
        return found

    def figures(self) -> dict[str, Any]:
        """Bytes; and how far logits are from those of the whole cache with dropped tokens and padding hidden."""
        found: dict[str, Any] = {f"{which}_bytes": stored(c.layers, {}, {}) for which, c in self.caches.items()}
        kept, real = self.kept(), self.real[:, None, : self.length]
        crop(self.caches["dense"], self.length)
        visible = []
        for places in kept:
            held = torch.zeros(*places.shape[:2], self.length + 1, dtype=torch.bool)
            held.scatter_(2, places.where((places >= 0) & (places < self.length), self.length), True)
            visible.append(held[..., : self.length] & real)
        slots = sum((p < self.length).sum((1, 2)) for p in kept)  # by sample, of the prompt
        AttentionMaskInterface.register("judge", lambda *_, **__: None)
        AttentionInterface.register("judge", lambda module, *args, **more: judge(visible, module, *args, **more))
        self.model.set_attn_implementation("judge")
        at = range(self.length, self.length + JUDGED)
        wanted = torch.stack([self.call(self.caches["dense"], i, i + 1) for i in at])
        self.model.set_attn_implementation("sdpa")
        said = {"error": self.logits["kept"][:JUDGED], "dropping": self.logits["dense"][:JUDGED]}
        if self.name == "kvpress" and not bool(self.real.all()):  # as its own pipeline steps: positions, no mask
            crop(self.caches["kept"], self.budget)
            said["error_no_mask"] = [self.call(self.caches["kept"], i, i + 1, masked=False) for i in at]
        for name, logits in said.items():  # by sample, relative to the largest logit
            found[name] = ((torch.stack(logits) - wanted).abs().amax((0, 2)) / wanted.abs().max()).tolist()
        torch.save(visible, f"{self.folder}/{self.name}.pt")
        return found | {"text": (sum(v.sum((1, 2)) for v in visible) / slots).tolist()}

    def held(self) -> Any:
        if self.name == "saccade":
            from saccade.cache import Cache
            from saccade.systems.cache.snapkv import SnapKV

            return Cache(self.model, SnapKV(self.window).policy(), budget=self.budget)
        import kvpress

        side, self.places = self, {}

        class Noted(kvpress.SnapKVPress):  # what its base will keep
            def score(self, module: Any, *args: Any, **more: Any) -> Tensor:
                scores = super().score(module, *args, **more)
                side.places[module.layer_idx] = scores.topk(side.budget, dim=-1).indices
                return scores

        self.press = Noted(1 - self.budget / self.length, self.window, 5)
        return DynamicCache()

    def pressing(self) -> Any:
        return self.caches["kept"] if self.name == "saccade" else self.press(self.model)

    def kept(self) -> list[Tensor]:
        """Places of the tokens held, by layer ``[B, Hkv, M]``."""
        cache, dense = self.caches["kept"], self.caches["dense"]
        if self.name == "saccade":
            return [torch.cat([s.positions for s in layer.segments], 1) for layer in cache.layers]
        for i, places in self.places.items():  # what was noted is what is held
            index = places[..., None].expand(-1, -1, -1, cache.layers[i].keys.shape[-1])
            assert cache.layers[i].keys[:, :, : self.budget].equal(dense.layers[i].keys.gather(2, index))
        return [self.places[i] for i in sorted(self.places)]


def crop(cache: Any, length: int) -> None:
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, :length], layer.values[:, :, :length]


def judge(
    visible: list[Tensor], module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Plain attention of a step in which every key head sees what it held, and what came since."""
    group, seen = query.shape[1] // key.shape[1], visible[module.layer_idx]
    seen = F.pad(seen, (0, key.shape[2] - seen.shape[2]), value=True).repeat_interleave(group, 1)[:, :, None]
    scores = (query @ key.repeat_interleave(group, 1).mT * scaling).masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1) @ value.repeat_interleave(group, 1)).transpose(1, 2).contiguous(), None


if __name__ == "__main__":
    answers, sys.stdout = sys.stdout, sys.stderr
    disable_progress_bar()
    side = Side(*sys.argv[1:])
    with torch.no_grad():
        for line in sys.stdin:
            name, *args = json.loads(line)
            print(json.dumps(getattr(side, name)(*args)), file=answers, flush=True)
