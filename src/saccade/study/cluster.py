"""Cells measured by the workers of a Ray cluster. Files are written here alone, so workers need no common disk."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ..core.errors import SpecError
from .cells import Job, Measured


class _Worker:
    """One process of the cluster: the job, made once there, and its cells one at a time."""

    def __init__(self, job: Job, threads: int):
        import torch

        torch.set_num_threads(threads)
        self.job = job

    def measure(self, number: int, cell: Any) -> tuple[int, dict[str, Any], float]:
        start = time.perf_counter()
        return number, self.job.measure(cell), time.perf_counter() - start


def over(address: str, threads: int = 1) -> Callable[[Job, Sequence[Any]], Iterator[Measured]]:
    """A way to measure cells: on the Ray cluster at ``address`` (``host:port``, ``auto``; ``local`` starts one here).

    A worker has ``threads`` CPUs to itself, and there are as many as the cluster has room for; a model is loaded by
    each worker from the name that the study was given, which must mean the same there.

    Raises:
        SpecError: nothing answers at the address, or no machine of the cluster has so many CPUs.
    """

    def spread(job: Job, cells: Sequence[Any]) -> Iterator[Measured]:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no network that nobody asked for
        os.environ.setdefault("RAY_worker_niceness", "0")  # a yielding worker measures the others' work
        import ray
        from ray.util import ActorPool

        options: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
        try:
            if ":" in address:  # Ray itself would go on trying for minutes
                host, port = address.removeprefix("ray://").rsplit(":", 1)
                socket.create_connection((host, int(port)), timeout=10).close()
            ray.init(address=address, log_to_driver=False, **options)
        except (OSError, ValueError) as error:
            raise SpecError(
                f"no Ray cluster at {address!r} ({error}): start one with 'ray start --head', or use local"
            ) from error
        try:
            rooms = [int(node["Resources"].get("CPU", 0)) // threads for node in ray.nodes() if node["Alive"]]
            if not sum(rooms):
                raise SpecError(f"no machine of the cluster at {address!r} has {threads} CPUs for a worker")
            actor = ray.remote(num_cpus=threads)(_Worker)
            workers = [actor.remote(job, threads) for _ in range(min(sum(rooms), len(cells)))]
            pool = ActorPool(workers)
            done = pool.map_unordered(lambda worker, numbered: worker.measure.remote(*numbered), list(enumerate(cells)))
            for number, result, seconds in done:
                yield cells[number], result, seconds
        finally:
            ray.shutdown()

    return spread
