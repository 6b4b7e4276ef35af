"""Claims: measure what a paper says at small scale, and the ledger that keeps what came out, whatever it was."""

from __future__ import annotations

import ast
import datetime
import hashlib
import inspect
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..core.errors import SpecError
from ..systems.base import ClaimNumbers, System, Unmeasured, Verdict

LEDGER = Path(__file__).parent / "ledger"
USUAL = 100.0  # seconds that a claim is given


@dataclass(frozen=True)
class ClaimResult:
    """One entry of the ledger: what was measured, and where, with what, and by which command."""

    slug: str
    verdict: Verdict
    numbers: dict[str, Any]
    statement: str
    seconds: float
    machine: str
    versions: dict[str, str]
    command: str
    measured: str = ""  # the day
    source: str = ""  # a hash of the system's file, and of what it has in its family, as they were then


def run(system_cls: type[System], out: Path | str | None = None) -> ClaimResult:
    """Measure a system's claim, with its default settings and on one CPU thread, and write the result.

    One thread, because several wait for each other at every operator: beside another job, that wait is what one would
    measure.

    Args:
        system_cls: the system.
        out: directory for ``<slug>.json``; the package's own ledger if not given.

    Raises:
        SpecError: the directory cannot be written.
    """
    start = time.perf_counter()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        measured = system_cls().claim()
    except Unmeasured as why:
        measured = ClaimNumbers({}, "not measured", f"Not measured: {why.reason}.")
    finally:
        torch.set_num_threads(threads)
    result = ClaimResult(
        system_cls.slug,
        measured.verdict,
        measured.numbers,
        measured.statement,
        round(time.perf_counter() - start, 1),
        machine(),
        {"saccade": __version__, "torch": str(torch.__version__), "python": platform.python_version()},
        f"saccade claim {system_cls.slug}",
        datetime.date.today().isoformat(),
        _source(system_cls),
    )
    _write(result, _folder(out))
    return result


def refresh(
    systems: Iterable[type[System]], minutes: float = math.inf, out: Path | str | None = None
) -> Iterator[ClaimResult | tuple[str, Exception]]:
    """Measure claims one after another, those first that were never measured, then those whose file has changed since,
    then the oldest; none is begun that would not end within the budget, by the time it took last.

    Yields each result, or the slug and what went wrong: one broken claim does not stop the others.
    """
    systems, known, start = list(systems), {}, time.perf_counter()
    for system in systems:
        with suppress(OSError, SpecError):  # not there, or no entry: it is measured anew
            known[system.slug] = _entry(_folder(out) / f"{system.slug}.json")

    def age(system: type[System]) -> tuple[bool, bool, str]:
        entry = known.get(system.slug)
        return entry is not None, entry is not None and entry.source == _source(system), entry.measured if entry else ""

    for system in sorted(systems, key=age):
        expected = known[system.slug].seconds if system.slug in known else USUAL
        if time.perf_counter() - start + expected > 60 * minutes:
            continue
        try:
            yield run(system, out)
        except Exception as error:
            yield system.slug, error


def _source(system: type[System]) -> str:
    """A hash of the system's file and of what it has in its family: ``from ._part import ...``, and so on."""
    waiting, files = [Path(inspect.getfile(system))], dict[Path, bytes]()
    while waiting:
        if (path := waiting.pop()) not in files:
            files[path] = path.read_bytes()
            parts = (node.module for node in ast.walk(ast.parse(files[path]))
                     if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module)  # fmt: skip
            waiting += [path.with_name(f"{part}.py") for part in parts]
    own, *others = files
    return hashlib.sha256(b"".join(files[path] for path in [own, *sorted(others)])).hexdigest()[:12]


def ledger(folder: Path | str | None = None) -> dict[str, ClaimResult]:
    """Every result of the ledger by slug; of the package's own if no directory is given.

    Raises:
        SpecError: a file there is not an entry.
    """
    entries = map(_entry, sorted(_folder(folder).glob("*.json")))
    return {result.slug: result for result in entries}


def _folder(given: Path | str | None) -> Path:
    return LEDGER if given is None else Path(given)


def _entry(path: Path) -> ClaimResult:
    try:
        return ClaimResult(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise SpecError(f"{path} is not an entry of the ledger ({error}): measure it again") from error


def machine() -> str:
    """The processor and its cores, and the accelerator if there is one."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].partition(":")[2].strip() if lines else name
    device = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{name}, {os.cpu_count()} cores{device}"


def _write(result: ClaimResult, folder: Path) -> None:
    """Write whole or not at all, so that an interrupted claim leaves the last result."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f".{result.slug}.{os.getpid()}.part"
        part.write_text(json.dumps(asdict(result), indent=2) + "\n")
        part.replace(folder / f"{result.slug}.json")
    except OSError as error:
        raise SpecError(f"the ledger {folder} cannot be written ({error}): give another directory") from error


@dataclass(frozen=True)
class Times:
    """Seconds of every round, by name."""

    seconds: dict[str, list[float]]

    def median(self, name: str) -> float:
        """Median seconds."""
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, other: str) -> float:
        """How many times as long ``name`` takes as ``other``: the median over the rounds, each of which ran both."""
        pairs = zip(self.seconds[name], self.seconds[other], strict=True)
        return statistics.median(a / b for a, b in pairs)


def interleaved(work: Mapping[str, Callable[[], Any]], rounds: int = 9) -> Times:
    """Time several pieces of work in turns, so that whatever else the machine does strikes them all alike.

    One round before the first warms up; the order turns around from round to round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(rounds + 1):
        for name in list(work)[:: 1 if turn % 2 else -1]:
            start = time.perf_counter()
            work[name]()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return Times(seconds)
