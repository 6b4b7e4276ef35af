"""The command line: ``saccade study | view | report | list | show | check | claim | zoo``.

Wrong input: one line and code 2.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
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
    name: Annotated[
        str | None, typer.Argument(help="A named study of the catalogue's family bench; programs in a model if none.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Directory or Hub id of a causal LM; the zoo's if not given.")
    ] = None,
    systems: Annotated[str | None, typer.Option(help="Names, comma separated; 'all' for every one.")] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Of text, needle, recall, lookup, copy, passkey, tracking, aggregation.")
    ] = None,
    lengths: Annotated[str | None, typer.Option(help="Tokens, comma separated.")] = None,
    count: Annotated[int | None, typer.Option(help="Samples per task and length.")] = None,
    repeats: Annotated[int | None, typer.Option(help="Timed rounds.")] = None,
    out: Annotated[Path | None, typer.Option(help="Directory for cells, results and report; runs/NAME.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the samples.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of torch; all cores if not given.")] = None,
    fresh: Annotated[bool, typer.Option(help="Forget the cells that are there.")] = False,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="A setting of a named study: --set widths=[32,64].")
    ] = None,
    small: Annotated[bool, typer.Option(help="The smallest sensible run of a named study: a first look.")] = False,
    ray: Annotated[
        str | None, typer.Option(help="Spread the cells over a Ray cluster: host:port, auto, or local.")
    ] = None,
) -> None:
    """Compare attention programs in a model: quality, time and memory, each against dense in the same run.

    With NAME, the study of that name instead (saccade list --family bench).
    """
    with told_plainly():
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        if threads is not None:
            _use_threads(threads)
        out = out or Path("runs") / (name or "study")
        if out.exists() and not out.is_dir():
            stop(f"--out {out} is a file, not a directory")
        chosen: dict[str, Any] = {"model": model, "count": count, "repeats": repeats, "seed": seed}
        if lengths is not None:
            chosen["lengths"] = _numbers(lengths, "--lengths")
        if tasks is not None:
            chosen["tasks"] = _names(tasks, "--tasks")
        if systems is not None:
            from .study.programs import names

            chosen["systems"] = tuple(names()) if systems == "all" and name is None else _names(systems, "--systems")
        chosen = {option: value for option, value in chosen.items() if value is not None}
        started = time.monotonic()
        how: dict[str, Any] = {}
        if ray is not None:
            from .study import cluster

            how["spread"] = cluster.over(ray, threads or 1)
        if name is None:
            if settings or small:
                stop("--set and --small belong to a named study: saccade list --family bench")
            results, page, counts = _compare_programs(chosen, out, fresh, how, started)
        else:
            results, page, counts = _compare_named(name, chosen | _settings(settings), small, out, fresh, how, started)
    console.print(results)
    console.print(f"{counts} cells computed now. Report: {page}", soft_wrap=True)


def _compare_programs(
    chosen: dict[str, Any], out: Path, fresh: bool, how: dict[str, Any], started: float
) -> tuple[Any, Path, str]:
    from .study import report
    from .study.runner import Settings, Study

    job = Study(Settings(**chosen), out)
    found, counts = _with_progress(job, out, fresh, job.run, how)
    results = report.collect(job, found, _command(), time.monotonic() - started)
    return report.table(results), report.write(results, out)[1], counts


def _compare_named(
    name: str, chosen: dict[str, Any], small: bool, out: Path, fresh: bool, how: dict[str, Any], started: float
) -> tuple[Any, Path, str]:
    from .study import cells
    from .systems.base import StudySystem

    system = _system(name)
    if not issubclass(system, StudySystem):
        stop(f"{name} is a system, not a study: saccade study --systems {name}, or saccade claim {name}")
    unknown = sorted(set(chosen) - set(system.settings()))
    if unknown:
        stop(f"{name} has no setting {unknown[0]!r}: there are {', '.join(system.settings()) or 'none'}")
    job = system(**({**system.small, **chosen} if small else chosen)).comparison()
    found, counts = _with_progress(job, out, fresh, lambda *a, **k: cells.run(job, out / "cells", *a, **k), how)
    page, seconds = job.page(found, _command(), time.monotonic() - started), time.monotonic() - started
    kept = {"command": _command(), "seconds": round(seconds, 1), "summary": job.summary(found), "cells": found}
    cells.write_whole(out / "results.json", json.dumps(kept, indent=1))
    cells.write_whole(out / "report.html", page.html())
    return page.table(), out / "report.html", counts


def _settings(given: list[str] | None) -> dict[str, Any]:
    """``name=value`` each; a value is JSON, or else a word."""
    found: dict[str, Any] = {}
    for text in given or []:
        name, equals, value = text.partition("=")
        if not (name and equals):
            stop(f"--set must be name=value; got {text!r}")
        try:
            read = json.loads(value)
        except ValueError:
            read = value
        found[name] = tuple(read) if isinstance(read, list) else read
    return found


def _use_threads(threads: int) -> None:
    import torch

    if not 1 <= threads <= 4 * (os.cpu_count() or 1):
        stop(f"--threads must lie in 1..{4 * (os.cpu_count() or 1)}; got {threads}")
    torch.set_num_threads(threads)


def _command() -> str:
    return shlex.join(["saccade", *sys.argv[1:]])


def _with_progress(job: Any, out: Path, fresh: bool, run: Any, how: dict[str, Any]) -> tuple[list[Any], str]:
    """Run a study under a progress bar; what it found, and how many of its cells were computed now."""
    from .study.progress import bar

    if fresh:
        for path in (out / "cells").glob("*.json"):
            path.unlink()
    done = 0
    try:
        with bar(len(job.cells), "study") as tell:

            def on_cell(cell: Any, computed: bool) -> None:
                nonlocal done
                done += computed
                tell(job.name(cell), 1)

            found = run(on_cell, **how)
    except KeyboardInterrupt:
        print(f"saccade: interrupted; {done} cells of this run are kept. Go on: {_command()}", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
    except OSError as error:
        stop(f"cannot write to {out}: {error}")
    return found, f"{done} of {len(found)}"


@app.command()
def view(
    model: Annotated[str, typer.Argument(help="Directory or Hub id of a transformers model, or the zoo's lm.")],
    text: Annotated[Path | None, typer.Option(help="File that the model reads.")] = None,
    target: Annotated[Path | None, typer.Option(help="File that the decoder of an encoder-decoder reads.")] = None,
    image: Annotated[Path | None, typer.Option(help="File that a vision model sees.")] = None,
    system: Annotated[str | None, typer.Option(help="Slug: show the model before and after it is installed.")] = None,
    edit: Annotated[list[str] | None, typer.Option(help="Show before and after an edit: 'Zero(keys=0)'.")] = None,
    layers: Annotated[str | None, typer.Option(help="Only these, comma separated.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Of each text, at most.", min=1)] = None,
    port: Annotated[int, typer.Option(help="Of 127.0.0.1; a free one if 0.", min=0, max=65535)] = 0,
    no_open: Annotated[bool, typer.Option("--no-open", help="Print the link and open no browser.")] = False,
) -> None:
    """Show a model's attention as a page on this machine: maps, exact rows, lines, scores."""
    with told_plainly():
        from .viewer import Server, load

        _hush()
        chosen = None if layers is None else _numbers(layers, "--layers")
        with console.status("loading the model") as status:
            session = load.session(
                model, text=text, target=target, image=image, most=tokens, layers=chosen, system=system,
                changes=edit or (), say=status.update,
            )  # fmt: skip
        try:
            server = Server(session, port)
        except OSError as error:
            stop(f"port {port} of this machine cannot be used: {error.strerror}")
    kept = sum(run.bytes for run in session.sides.values())
    console.print(f"queries and keys kept: {kept / 1e6:.0f} MB. Ctrl-C ends. The link works on this machine alone:")
    print(server.link, flush=True)
    if not no_open:
        typer.launch(server.link)
    try:
        server.run()
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None


def _hush() -> None:
    """Transformers loads a model in silence: the status line says what is done."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@app.command("report")
def report_(
    model: Annotated[str, typer.Argument(help="Directory or Hub id of a transformers model, or the zoo's lm.")],
    text: Annotated[Path | None, typer.Option(help="File that the model reads.")] = None,
    target: Annotated[Path | None, typer.Option(help="File that the decoder of an encoder-decoder reads.")] = None,
    image: Annotated[Path | None, typer.Option(help="File that a vision model sees.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Of each text, at most.", min=1)] = None,
    pieces: Annotated[int, typer.Option(help="Cut a text into so many inputs, of 64 tokens at least.", min=1)] = 8,
    out: Annotated[Path, typer.Option(help="The page with pictures.")] = Path("heads.html"),
) -> None:
    """Say what every attention head of a model does and how sure that is; write a page with pictures."""
    with told_plainly():
        from .study import atlas
        from .viewer import load

        _hush()
        loaded, inputs, _ = load.read(model, text, target, image, tokens)
        several = [inputs]
        if image is None and target is None:
            ids = inputs["input_ids"]
            several = [inputs | {"input_ids": part} for part in ids.chunk(max(1, min(pieces, ids.shape[1] // 64)), 1)]
        found = replace(atlas.report(loaded, several), model=model, command=_command())
        try:
            page = found.save(out)
        except OSError as error:
            stop(f"cannot write {out}: {error.strerror}")
    console.print(found.table())
    console.print(f"Pictures: {page}", soft_wrap=True)


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
    budget: Annotated[
        float, typer.Option(help="Minutes: no claim is begun that would not end in them, by what it took last.")
    ] = math.inf,
) -> None:
    """Measure what a system's paper claims at small scale, and write it into the ledger, whatever it is.

    With --all: those first that were never measured, then those whose file has changed since, then the oldest.
    """
    failed, measured = [], 0
    with told_plainly():
        from .study import claims

        chosen = _chosen(name, every)
        for result in claims.refresh(chosen, budget, out):
            measured += 1
            if isinstance(result, tuple):
                slug, error = result
                if not every:
                    raise error
                failed.append(slug)
                console.print(f"[bold]{slug}[/bold]: [red]{type(error).__name__}[/red]", end=" ")
                console.print(str(error), markup=False)
                continue
            console.print(f"[bold]{result.slug}[/bold]: {result.verdict} ({result.seconds:.0f} s)")
            console.print(result.statement, markup=False)
            console.print(json.dumps(result.numbers, indent=1), markup=False)
    if measured < len(chosen):
        console.print(f"{len(chosen) - measured} of {len(chosen)} claims did not fit into {budget:g} minutes")
    if failed:
        stop(f"claims that ended with an error: {', '.join(failed)}", 1)


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
    name: Annotated[str, typer.Argument(help="Which checkpoint: lm, lm-small, lm-tiny or vit.")],
    out: Annotated[Path | None, typer.Option(help="Directory to write; the package's own if not given.")] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps.")] = None,
    seed: Annotated[int, typer.Option()] = 0,
    threads: Annotated[int | None, typer.Option(help="Worker processes of one thread each.")] = None,
) -> None:
    """Train a checkpoint by its recipe; an interrupted training of a language model goes on from where it was."""
    from . import zoo

    if steps is not None and steps < 1:
        stop(f"--steps must be at least 1; got {steps}")
    with told_plainly():
        from .zoo import lm, vit

        if name not in (*lm.SIZES, "vit"):
            stop(f"unknown checkpoint {name!r}: there are {', '.join(lm.SIZES)}, vit")
        where = out or zoo.CHECKPOINTS / name
        if name == "vit":
            if threads is not None:
                stop("--threads is for language models: a vit trains in minutes, in one process")
            vit.train(where, seed=seed, steps=steps)
            console.print(f"trained: {where}", soft_wrap=True)
            return
        try:
            lm.train(where, name=name, seed=seed, threads=threads, steps=steps)
        except (ValueError, RuntimeError) as error:
            stop(error)
        except KeyboardInterrupt:
            print(f"saccade: interrupted; what was trained is kept. Go on: {_command()}", file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from None
    console.print(f"trained: {where}", soft_wrap=True)
