"""Threads that share the tiles of a call on a CPU.

After each operation that PyTorch spreads over all cores, the cores wait for the slowest; a tile has ten of them and
some Python. Here every thread works on tiles of its own, from the scores to the output, and takes the next when done.
"""

from __future__ import annotations

import contextvars
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import lru_cache
from typing import TypeVar

import torch
from torch.autograd import _profiler_enabled

MOST = 8  # threads: more would wait for Python's lock (a guess: measured on two cores); each then uses several cores
WORTH = 2**20  # cells of the score matrix below which the caller works alone (not tuned)

T = TypeVar("T")
R = TypeVar("R")


def hands(device: torch.device, cells: int) -> int:
    """How many threads should share a call that computes so many cells; 1: the caller alone."""
    if device.type != "cpu" or cells < WORTH or torch.compiler.is_compiling():
        return 1
    # A mode and a profiler see the operations of the caller's thread alone.
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack() or _profiler_enabled():
        return 1
    return min(torch.get_num_threads(), MOST)


def share(parts: Sequence[Iterable[T]], work: Callable[[Iterable[T]], R], count: int) -> list[R]:
    """What ``work`` gives for each part, in order, with ``count`` threads.

    Gradients are off in there, as in the forward and backward of an autograd function. After an error, or when
    interrupted, no thread goes on to another item.
    """
    if count == 1:
        return [work(part) for part in parts]
    stop = threading.Event()
    inference = torch.is_inference_mode_enabled()

    def until_stopped(items: Iterable[T]) -> Iterable[T]:
        for item in items:
            if stop.is_set():
                return
            yield item

    def run(part: Iterable[T]) -> R:
        with torch.inference_mode(inference), torch.no_grad():
            return work(until_stopped(part))

    pool = _pool(count, torch.get_num_threads())
    futures = [pool.submit(contextvars.copy_context().run, run, part) for part in parts]
    try:
        return [future.result() for future in futures]
    finally:
        stop.set()
        wait(futures)


@lru_cache(maxsize=1)
def _pool(count: int, cores: int) -> ThreadPoolExecutor:
    """Threads of ``cores // count`` cores each."""
    started = threading.Barrier(count + 1)

    def start() -> None:
        torch.get_num_threads()  # else a thread's first operation sets the number of the whole process
        torch.set_num_threads(max(1, cores // count))
        started.wait()

    pool = ThreadPoolExecutor(count, "saccade", initializer=start)
    for _ in range(count):
        pool.submit(int)
    started.wait()
    torch.set_num_threads(cores)  # for threads that others start: they take the number that was set last
    return pool


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not survive a fork
