"""The command line: ``saccade study | list | show | check | claim | zoo``. Wrong input gets one line and code 2."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, NoReturn

INTERRUPTED = 130  # the exit code of a command ended by Ctrl-C
MISSING = 'saccade: the workbench needs packages that are not installed ({}): pip install "saccade[workbench]"'

try:
    import rich.console
    import rich.table
    import typer
except ModuleNotFoundError as error:
    sys.exit(MISSING.format(error.name))

from .core.errors import SpecError, Unsupported  # noqa: E402  (after the check that the packages are there)

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Attention as a small program: study, list, check.")
zoo_app = typer.Typer(no_args_is_help=True, help="Small trained checkpoints and the recipes that made them.")
app.add_typer(zoo_app, name="zoo")
console = rich.console.Console()


def main() -> None:
    """Entry point of the command ``saccade``."""
    try:
        app()
    except SystemExit as end:
        if end.code != INTERRUPTED:
            raise
        # An interrupt that passed through code run from C makes CPython die of the signal, whatever the exit code.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(INTERRUPTED)


def stop(message: object, code: int = 2) -> NoReturn:
    """Say one line on stderr and leave."""
    print("saccade: " + " ".join(str(message).split()), file=sys.stderr)
    raise typer.Exit(code)


@contextmanager
def told_plainly() -> Iterator[None]:
    """Errors that are the input's fault become one line and exit code 2; a missing package says how to get it."""
    try:
        yield
    except (SpecError, Unsupported) as error:
        stop(error)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("saccade"):
            raise
        print(MISSING.format(error.name), file=sys.stderr)
        raise typer.Exit(2) from error


def _names(text: str, what: str) -> tuple[str, ...]:
    found = tuple(part.strip() for part in text.split(",") if part.strip())
    if not found:
        stop(f"{what} must be a list such as a,b; got {text!r}")
    return found


def _numbers(text: str, what: str) -> tuple[int, ...]:
    parts = _names(text, what)
    wrong = [part for part in parts if not part.isdecimal()]
    if wrong:
        stop(f"{what} must be whole numbers such as 512,1024; got {wrong[0]!r}")
    return tuple(map(int, parts))


@app.command()
def study(
    model: Annotated[
        str | None, typer.Option(help="Directory or Hub id of a causal LM; the zoo's if not given.")
    ] = None,
    systems: Annotated[str | None, typer.Option(help="Names, comma separated; 'all' for every one.")] = None,
    tasks: Annotated[str | None, typer.Option(help="Of text, needle, recall, lookup, copy.")] = None,
    lengths: Annotated[str | None, typer.Option(help="Tokens, comma separated.")] = None,
    count: Annotated[int | None, typer.Option(help="Samples per task and length.")] = None,
    repeats: Annotated[int | None, typer.Option(help="Timed rounds.")] = None,
    out: Annotated[Path, typer.Option(help="Directory for cells, results.json and report.html.")] = Path("runs/study"),
    seed: Annotated[int, typer.Option(help="Of the samples.")] = 0,
    threads: Annotated[int | None, typer.Option(help="Threads of torch; all cores if not given.")] = None,
    fresh: Annotated[bool, typer.Option(help="Forget the cells that are there.")] = False,
) -> None:
    """Compare attention programs in a model: quality, time and memory, each against dense in the same run."""
    with told_plainly():
        import transformers

        from .study import report
        from .study.programs import names
        from .study.runner import Settings, Study

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        if threads is not None:
            _use_threads(threads)
        if out.exists() and not out.is_dir():
            stop(f"--out {out} is a file, not a directory")
        chosen: dict[str, Any] = {"model": model, "count": count, "repeats": repeats, "seed": seed}
        if systems is not None:
            chosen["systems"] = tuple(names()) if systems == "all" else _names(systems, "--systems")
        if tasks is not None:
            chosen["tasks"] = _names(tasks, "--tasks")
        if lengths is not None:
            chosen["lengths"] = _numbers(lengths, "--lengths")
        started = time.monotonic()
        job = Study(Settings(**{name: value for name, value in chosen.items() if value is not None}), out)
        if fresh:
            for cell in (out / "cells").glob("*.json"):
                cell.unlink()
        try:
            cells = _with_progress(job)
        except KeyboardInterrupt:
            print(
                f"saccade: interrupted; {job.computed} cells of this run are kept. Go on: {_command()}", file=sys.stderr
            )
            raise typer.Exit(INTERRUPTED) from None
        except OSError as error:
            stop(f"cannot write to {out}: {error}")
        results = report.collect(job, cells, _command(), time.monotonic() - started)
        data, page = report.write(results, out)
    console.print(report.table(results))
    console.print(f"{job.computed} of {len(cells)} cells computed now. Report: {page}  Numbers: {data}", soft_wrap=True)


def _use_threads(threads: int) -> None:
    import torch

    if not 1 <= threads <= 4 * (os.cpu_count() or 1):
        stop(f"--threads must lie in 1..{4 * (os.cpu_count() or 1)}; got {threads}")
    torch.set_num_threads(threads)


def _command() -> str:
    return shlex.join(["saccade", *sys.argv[1:]])


def _with_progress(job: Any) -> list[dict[str, Any]]:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    shown = rich.console.Console(stderr=True)
    with Progress(*columns, TimeRemainingColumn(elapsed_when_finished=True), console=shown) as bar:
        cells = job.cells
        line = bar.add_task("study", total=len(cells))

        def on_cell(cell: Any, computed: bool) -> None:
            bar.update(line, advance=1, description=f"{cell.entry.name} {cell.task} {cell.length}")

        return job.run(on_cell)


@app.command("list")
def list_(
    family: Annotated[str | None, typer.Option(help="Only this family.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Show every system of the catalogue: slug, family, title, promises and what its claim measured."""
    with told_plainly():
        from . import catalog
        from .study import claims

        found, ledger = catalog.systems(), claims.ledger()
        families = sorted({s.family for s in found.values()})
        if family is not None and family not in families:
            stop(f"unknown family {family!r}: there are {', '.join(families)}")
        rows = [_card(s, ledger.get(s.slug)) for s in found.values() if family in (None, s.family)]
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    table = rich.table.Table()
    for title in ("slug", "family", "title", "promises", "claim"):
        table.add_column(title, overflow="fold")
    for row in rows:
        kept = ", ".join(_promise(name, value) for name, value in row["promises"].items() if value is True)
        table.add_row(
            row["slug"], row["family"], row["title"], f"{kept}, N^{row['promises']['exponent']:g}", row["claim"]
        )
    console.print(table)


def _promise(name: str, value: Any) -> str:
    return name.replace("_", " ") if value is True else f"{name.replace('_', ' ')}: {value}"


def _card(system: Any, result: Any) -> dict[str, Any]:
    return {
        "slug": system.slug,
        "family": system.family,
        "title": system.title,
        "paper": system.paper,
        "code": system.code,
        "promises": asdict(system.promises),
        "claim": "not measured" if result is None else result.verdict,
    }


@app.command()
def show(name: Annotated[str, typer.Argument(help="Slug, or module:Class.")]) -> None:
    """Show one system: where it comes from, its settings and promises, and what its claim measured."""
    with told_plainly():
        import inspect

        from .study import claims

        system = _system(name)
        result = claims.ledger().get(system.slug)
    console.print(f"[bold]{system.title}[/bold] ({system.slug}, family {system.family})")
    console.print(f"paper: {system.paper}\ncode: {system.code or 'none published'}", soft_wrap=True)
    settings = {k: "required" if v is inspect.Parameter.empty else v for k, v in system.settings().items()}
    console.print("settings: " + (", ".join(f"{k}={v}" for k, v in settings.items()) or "none"), markup=False)
    console.print("promises: " + ", ".join(_promise(*p) for p in asdict(system.promises).items()), markup=False)
    if result is None:
        console.print(f"claim: not measured yet (saccade claim {system.slug})")
    else:
        console.print(f"claim: {result.verdict}. {result.statement}", markup=False)
        console.print(json.dumps(result.numbers, indent=1), markup=False)
        console.print(f"measured in {result.seconds} s on {result.machine} by: {result.command}", markup=False)
    console.print((inspect.getdoc(inspect.getmodule(system)) or "").strip(), markup=False)


def _system(name: str) -> Any:
    from . import catalog

    return catalog.load(name) if ":" in name else catalog.find(name)


def _chosen(name: str | None, every: bool) -> list[Any]:
    if (name is None) == (not every):
        stop("give one NAME, or --all")
    if name is not None:
        return [_system(name)]
    from . import catalog

    return list(catalog.systems().values())


Name = Annotated[str | None, typer.Argument(help="Slug, or module:Class.")]
Every = Annotated[bool, typer.Option("--all", help="Every system of the catalogue.")]


@app.command()
def check(name: Name = None, every: Every = False) -> None:
    """Hold systems to the laws their promises imply; exit code 1 if one is broken."""
    with told_plainly():
        from .study import laws

        broken = 0
        for system in _chosen(name, every):
            console.print(f"[bold]{system.slug or system.__name__}[/bold]")
            for result in laws.check(system):
                broken += result.status == "failed"
                color = {"passed": "green", "failed": "red", "skipped": "yellow"}[result.status]
                console.print(f"  [{color}]{result.status:8}[/{color}] {result.law} ({result.seconds:.1f} s)")
                if result.detail:
                    console.print(f"           {result.detail}", markup=False)
    if broken:
        stop(f"{broken} laws are broken", 1)


@app.command()
def claim(
    name: Name = None,
    every: Every = False,
    out: Annotated[Path | None, typer.Option(help="Directory for the result; the ledger if not given.")] = None,
) -> None:
    """Measure what a system's paper claims at small scale, and write it into the ledger, whatever it is."""
    with told_plainly():
        from .study import claims

        for system in _chosen(name, every):
            result = claims.run(system, out)
            console.print(f"[bold]{result.slug}[/bold]: {result.verdict} ({result.seconds:.0f} s)")
            console.print(result.statement, markup=False)
            console.print(json.dumps(result.numbers, indent=1), markup=False)


@zoo_app.command("list")
def zoo_list() -> None:
    """Show the checkpoints that are there, and what they can do."""
    from . import zoo

    cards = sorted(zoo.CHECKPOINTS.glob("*/card.json"))
    if not cards:
        console.print("no checkpoint yet: saccade zoo train lm")
    for path in cards:
        card = json.loads(path.read_text())
        console.print(f"[bold]{card['name']}[/bold] {card['parameters']:,} parameters, {path.parent}", soft_wrap=True)
        console.print(f"  {json.dumps(card.get('skill', 'not measured'))}", markup=False, soft_wrap=True)


@zoo_app.command("train")
def zoo_train(
    name: Annotated[str, typer.Argument(help="Which checkpoint: lm.")],
    out: Annotated[Path | None, typer.Option(help="Directory to write; the package's own if not given.")] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps.")] = None,
    seed: Annotated[int, typer.Option()] = 0,
    threads: Annotated[int | None, typer.Option(help="Worker processes of one thread each.")] = None,
) -> None:
    """Train a checkpoint by its recipe; an interrupted training goes on from where it was."""
    from . import zoo

    if name != "lm":
        stop(f"unknown checkpoint {name!r}: there is lm")
    if steps is not None and steps < 1:
        stop(f"--steps must be at least 1; got {steps}")
    with told_plainly():
        from .zoo import lm

        options: dict[str, Any] = {} if steps is None else {"steps": steps}
        try:
            where = lm.train(out or zoo.CHECKPOINTS / name, seed=seed, threads=threads, **options)
        except (ValueError, RuntimeError) as error:
            stop(error)
        except KeyboardInterrupt:
            print(f"saccade: interrupted; what was trained is kept. Go on: {_command()}", file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from None
    console.print(f"trained: {where}", soft_wrap=True)
