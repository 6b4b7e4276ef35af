"""The catalogue finds systems by walking a package, and says clearly what is wrong with one it cannot use."""

import importlib
import subprocess
import sys
import textwrap

import pytest
from torch import nn

from saccade import Attention, SpecError, catalog
from saccade.cache import Policy
from saccade.nn.backbones import Place
from saccade.systems.base import CacheSystem, LayerSystem, MethodSystem, Promises, StudySystem, System

SYSTEM = """
from saccade import Attention
from saccade.systems.base import System

class {name}(System):
    slug = "{slug}"

    def build(self, heads):
        return Attention()
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A function that writes files into a fresh package and imports it."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)

    def write(files):
        for name, text in {"found/__init__.py": "", **files}.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            (path.parent / "__init__.py").touch()
            path.write_text(textwrap.dedent(text))
        importlib.invalidate_caches()
        return importlib.import_module("found")

    yield write
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("found", "mine", "needy", "wrong", "raises"):
            del sys.modules[name]


def test_the_four_are_there_with_family_and_everything_a_list_shows():
    there = catalog.systems()
    families = {slug: system.family for slug, system in there.items()}
    assert families.items() >= {
        ("flexattention", "core"), ("alpha-entmax", "score"), ("sigmoid", "score"), ("cog", "score"),
    }  # fmt: skip
    assert list(there) == sorted(there)
    for system in there.values():
        assert system.title and system.paper.startswith("https://arxiv.org/abs/")
        assert isinstance(system.promises, Promises)
        if issubclass(system, CacheSystem):
            assert isinstance(system().policy(), Policy)
        elif issubclass(system, StudySystem):
            assert system().comparison().cells
        elif issubclass(system, LayerSystem):
            assert isinstance(system().layer(Place(32, 4, 0, 2, None, None)), nn.Module)
        elif not issubclass(system, MethodSystem):
            assert isinstance(system().build(4), Attention)
        assert system.__module__.split(".")[-1] == system.slug.replace("-", "_")


def test_settings_are_the_constructors():
    cls = catalog.find("sigmoid")
    assert cls.settings() == {"length": 2048, "causal": True}
    assert repr(cls(length=7)) == "Sigmoid(length=7, causal=True)"
    assert System.settings() == {}


def test_importing_saccade_does_not_import_the_catalogue():
    code = "import sys, saccade; print([m for m in sys.modules if 'saccade.systems' in m or 'saccade.catalog' in m])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_a_package_is_walked_to_its_leaves_and_shared_bases_are_no_systems(package):
    hidden = SYSTEM.format(name="_Base", slug="")
    found = package(
        {
            "found/a/one.py": hidden + "\nclass One(_Base):\n    slug = 'one'\n",
            "found/b/two.py": "from found.a.one import One\n" + SYSTEM.format(name="Two", slug="two"),
        }
    )
    assert {slug: s.__name__ for slug, s in catalog.systems(found).items()} == {"one": "One", "two": "Two"}


def test_two_of_one_name_are_refused_and_both_files_named(package):
    found = package(
        {
            "found/a/one.py": SYSTEM.format(name="One", slug="same"),
            "found/b/two.py": SYSTEM.format(name="Two", slug="same"),
        }
    )
    with pytest.raises(SpecError, match=r"'same'.*one\.py.*two\.py"):
        catalog.systems(found)


def test_a_system_without_a_slug_is_refused(package):
    with pytest.raises(SpecError, match=r"one\.py: One has no slug"):
        catalog.systems(package({"found/a/one.py": SYSTEM.format(name="One", slug="")}))


@pytest.mark.parametrize(
    "text, said",
    [
        ("def broken(:\n", r"broken\.py, line 1: invalid syntax"),
        ("1 / 0\n", "found.a.broken does not import: ZeroDivisionError"),
        ("import no_such_library\n", "needs the module 'no_such_library', which is not installed"),
    ],
)
def test_a_broken_file_of_the_catalogue_is_an_error_not_a_gap(package, text, said):
    with pytest.raises(SpecError, match=said):
        catalog.systems(package({"found/a/broken.py": text}))


def test_a_family_that_does_not_import_is_an_error_not_a_gap(package):
    found = package({"found/a/one.py": SYSTEM.format(name="One", slug="one")})
    with open(found.__path__[0] + "/a/__init__.py", "w") as file:
        file.write("import no_such_library\n")
    with pytest.raises(SpecError, match="no_such_library"):
        catalog.systems(found)


@pytest.mark.parametrize("wrong, meant", [("sigmiod", "sigmoid"), ("alpha_entmax", "alpha-entmax"), ("Cog", "cog")])
def test_an_unknown_name_suggests_the_nearest(wrong, meant):
    with pytest.raises(SpecError, match=f"Did you mean '{meant}'.*saccade list"):
        catalog.find(wrong)


def test_a_name_like_no_other_suggests_nothing():
    with pytest.raises(SpecError) as error:
        catalog.find("zzzzzz")
    assert "mean" not in str(error.value) and "saccade list" in str(error.value)


def test_a_users_system_is_loaded_from_module_or_file(package, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(SYSTEM.format(name="Mine", slug="mine"))
    path = list(sys.path)
    by_file = catalog.load(f"{tmp_path}/mine.py:Mine")
    assert sys.path == path
    monkeypatch.chdir(tmp_path)
    by_module = catalog.load("mine:Mine")
    assert by_file is by_module and by_file.family == "own" and isinstance(by_file().build(2), Attention)


@pytest.mark.parametrize(
    "where, said",
    [
        ("mine", "expected module:Class"),
        ("mine:", "expected module:Class"),
        (":Mine", "expected module:Class"),
        ("no_such_module:Mine", "there is no module 'no_such_module'"),
        ("nowhere/mine.py:Mine", "there is no file nowhere/mine.py"),
        ("mine:Other", r"mine\.py has no Other; systems there: Mine"),
        ("mine:CONSTANT", "CONSTANT is not a system: derive it from"),
        ("needy:Mine", "needs the module 'no_such_library', which is not installed"),
        ("wrong:Mine", r"wrong\.py, line 2"),
        ("raises:Mine", "raises does not import: ValueError: no"),
    ],
)
def test_what_cannot_be_loaded_is_said(package, tmp_path, monkeypatch, where, said):
    (tmp_path / "mine.py").write_text(SYSTEM.format(name="Mine", slug="mine") + "\nCONSTANT = 3\n")
    (tmp_path / "needy.py").write_text("import no_such_library\n")
    (tmp_path / "wrong.py").write_text("x = 1\nclass Mine(:\n")
    (tmp_path / "raises.py").write_text("raise ValueError('no')\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SpecError, match=said):
        catalog.load(where)
