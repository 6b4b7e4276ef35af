"""Measuring: time with its spread, peak memory, bytes of a cache, operations of attention, error of its output."""

from __future__ import annotations

import copy
import os
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..core.spec import Attention
from ..hosts.acts import Program
from ..hosts.transformers import output_errors

Way = Callable[[Any], AbstractContextManager[Callable[[], Any]]]


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of ``n`` repeats."""

    median: float
    low: float
    high: float
    n: int

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        """Of at least one value; quartiles are interpolated between the repeats."""
        if len(values) == 1:
            return Spread(values[0], values[0], values[0], 1)
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return Spread(median, low, high, len(values))


def interleaved(
    ways: Sequence[AbstractContextManager[Any]], work: Callable[[int], Any], repeats: int
) -> list[list[float]]:
    """Seconds of the same work done in several ways, in turn, so that a slow minute of the machine hits all alike.

    Args:
        ways: context managers that can be entered again and again; entering and leaving is not timed.
        work: called with the number of the way it is done in; what it returns is called, timed, with what entering
            the way gave.
        repeats: timed rounds; one round before them is not counted.
    """
    seconds: list[list[float]] = [[] for _ in ways]
    for turn in range(repeats + 1):
        for number, (way, kept) in enumerate(zip(ways, seconds, strict=True)):
            call = work(number)
            with way as given:
                _synchronize()
                start = time.perf_counter()
                call(given)
                _synchronize()
                taken = time.perf_counter() - start
            if turn:
                kept.append(taken)
    return seconds


class _Running:
    """A way to run a model as a context manager that can be entered again and again; without one it is as it is."""

    def __init__(self, model: Any, way: Way | None):
        self.model, self.way = model, way

    def __enter__(self) -> Callable[[], Any]:
        self.now = ExitStack()
        return (lambda: None) if self.way is None else self.now.enter_context(self.way(self.model))

    def __exit__(self, *exc: object) -> None:
        self.now.close()


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """Most bytes that the call's tensors held at one time, beyond what was there before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler writes to the terminal when it starts
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as seen:
        call()
    events = seen.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = most = 0
    for _, change in changes:
        held += change
        most = max(most, held)
    return most


def cache_bytes(cache: Any) -> int:
    """Bytes of every storage that a transformers cache (or any object of tensors) really holds, each once."""
    storages: dict[int, int] = {}
    seen: dict[int, Any] = {}  # holds what it names: the id of a thing that is gone is given away again

    def look(thing: Any) -> None:
        if id(thing) in seen:
            return
        seen[id(thing)] = thing
        if isinstance(thing, Tensor):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(thing, (list, tuple)):
            for item in thing:
                look(item)
        elif isinstance(thing, dict):
            for item in thing.values():
                look(item)
        elif hasattr(thing, "__dict__") and not isinstance(thing, (type, nn.Module)):
            look(vars(thing))

    look(cache)
    return sum(storages.values())


def attention_work(model: nn.Module, *inputs: Tensor) -> int:
    """Operations of the products of scores and of values in every attention of a model, hidden pairs included."""
    total = 0

    def count(spec: nn.Module, given: tuple[Tensor, Tensor, Tensor], out: Tensor) -> None:
        nonlocal total
        q, k, v = given
        total += 2 * q.shape[:-1].numel() * k.shape[-2] * (q.shape[-1] + v.shape[-1])

    hooks = [part.register_forward_hook(count) for part in model.modules() if isinstance(part, Attention)]
    try:
        with torch.no_grad():
            model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return total


@torch.no_grad()
def speed(
    model: Any, way: Way, tokens: Tensor, *, repeats: int, steps: int, program: Program | None = None
) -> dict[str, Any]:
    """What a way to run a model costs, against the model as it is, in the same minutes.

    Args:
        model: a transformers causal language model.
        way: enters the way and yields what makes a fresh cache for it (``None``: the model's own).
        program: the way as a program, if it is one, for its output error.
        tokens: ``[1, N]``.
        repeats: timed rounds of each.
        steps: tokens decoded per round, on a cache that the prefill of ``tokens`` filled.

    Returns:
        ``prefill_s`` and ``decode_s`` (per token), their ``_dense`` twins and ``_ratio`` (round by round), as
        :class:`Spread`; ``prefill_peak_bytes`` and ``cache_bytes`` with ``_dense`` twins; ``output_error``, the mean
        over layers of ``|program - dense| / |dense|`` (Frobenius), and ``output_error_by_layer``, both ``None``
        without a program.
    """
    ways = [_Running(model, None), _Running(model, way)]

    def prefill(fresh: Callable[[], Any]) -> Any:
        return model(input_ids=tokens, past_key_values=fresh(), use_cache=True)

    result: dict[str, Any] = {}
    _told(result, "prefill", interleaved(ways, lambda number: lambda fresh: prefill(fresh), repeats))

    caches = []
    for running, suffix in zip(ways, ("_dense", ""), strict=True):
        with running as fresh:
            caches.append(prefill(fresh).past_key_values)
            result[f"cache_bytes{suffix}"] = cache_bytes(caches[-1])
            result[f"prefill_peak_bytes{suffix}"] = peak_bytes(partial(prefill, fresh), tokens.device)

    def decode(number: int) -> Callable[[Any], None]:
        filled = copy.deepcopy(caches[number])

        def steps_on(_: Any) -> None:
            for _ in range(steps):
                model(input_ids=tokens[:, -1:], past_key_values=filled, use_cache=True)

        return steps_on

    seconds = interleaved(ways, decode, repeats)
    _told(result, "decode", [[s / steps for s in one] for one in seconds])

    result["output_error_by_layer"] = result["output_error"] = None
    if program is not None:
        with output_errors(model, program) as errors:
            model(input_ids=tokens, use_cache=False)
        result["output_error_by_layer"] = [errors[layer] for layer in sorted(errors)]
        result["output_error"] = statistics.fmean(errors.values())
    return result


def _told(result: dict[str, Any], name: str, seconds: list[list[float]]) -> None:
    dense, program = seconds
    ratio = [b / a for a, b in zip(dense, program, strict=True)]
    for suffix, values in (("s", program), ("s_dense", dense), ("ratio", ratio)):
        result[f"{name}_{suffix}"] = asdict(Spread.of(values))
