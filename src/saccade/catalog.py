"""The catalogue: every system there is, found by walking :mod:`saccade.systems`. Nobody keeps a list."""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from . import systems as catalogued
from .core.errors import SpecError
from .systems.base import System


def systems(package: ModuleType = catalogued) -> dict[str, type[System]]:
    """Every system of a package by slug, in the order of the slugs.

    Raises:
        SpecError: a module does not import, a system has no slug, or two have the same one.
    """
    found: dict[str, type[System]] = {}
    for _, name, is_package in pkgutil.walk_packages(package.__path__, package.__name__ + ".", onerror=_refuse):
        if is_package:
            continue
        module = _import(name)
        for system in _defined(module):
            if not system.slug:
                raise SpecError(f'{_file(system)}: {system.__name__} has no slug: set slug = "its-name"')
            if system.slug in found:
                raise SpecError(
                    f"two systems are called {system.slug!r}: {_file(found[system.slug])} and {_file(system)}"
                )
            found[system.slug] = system
    return dict(sorted(found.items()))


def find(name: str) -> type[System]:
    """A system of the catalogue by its slug.

    Raises:
        SpecError: there is none of this name; the message suggests the nearest.
    """
    there = systems()
    if name in there:
        return there[name]
    near = difflib.get_close_matches(name.lower().replace("_", "-"), there, n=1, cutoff=0.5)
    meant = f" Did you mean {near[0]!r}?" if near else ""
    raise SpecError(f"there is no system {name!r}.{meant} `saccade list` shows them all.")


def load(where: str) -> type[System]:
    """A user's own system, from ``"module:Class"`` or ``"path/to/file.py:Class"``; the module may lie in the
    working directory.

    Raises:
        SpecError: no such module or class, the module does not import, or the class is not a System.
    """  # fmt: skip
    source, colon, name = where.rpartition(":")
    if not (colon and source and name.isidentifier()):
        raise SpecError(f"expected module:Class or path/to/file.py:Class; got {where!r}")
    path = Path(source)
    if path.suffix == ".py":
        if not path.is_file():
            raise SpecError(f"{where}: there is no file {path}")
        folder, source = path.resolve().parent, path.stem
    else:
        folder = Path.cwd()
    with _importable(folder):
        module = _import(source)
    system = getattr(module, name, None)
    if system is None:
        names = ", ".join(s.__name__ for s in _defined(module)) or "none"
        raise SpecError(f"{where}: {_file(module)} has no {name}; systems there: {names}")
    if not (inspect.isclass(system) and issubclass(system, System)):
        raise SpecError(f"{where}: {name} is not a system: derive it from saccade.systems.base.System")
    return system


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            raise SpecError(f"there is no module {name!r} (looked in the working directory too)") from error
        raise SpecError(f"{name} needs the module {error.name!r}, which is not installed") from error
    except SyntaxError as error:
        raise SpecError(f"{error.filename}, line {error.lineno}: {error.msg}") from error
    except Exception as error:  # whatever a user's file does when it is imported
        raise SpecError(f"{name} does not import: {type(error).__name__}: {error}") from error


def _refuse(name: str) -> None:
    """Importing a family's package failed while walking: say so, where pkgutil would go on in silence."""
    _import(name)


def _defined(module: ModuleType) -> list[type[System]]:
    """The systems a module itself defines; a leading underscore hides a shared base."""
    classes = [c for c in vars(module).values() if inspect.isclass(c) and issubclass(c, System)]
    return [c for c in classes if c.__module__ == module.__name__ != System.__module__ and c.__name__[0] != "_"]


def _file(thing: type | ModuleType) -> str:
    return inspect.getsourcefile(thing) or repr(thing)
