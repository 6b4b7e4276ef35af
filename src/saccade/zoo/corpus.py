"""English prose (ASCII) out of Debian's documentation packages: what the embedded models read."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import tempfile
import unicodedata
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

# Held-out prose comes from debian-handbook, which is therefore not among these.
PACKAGES = (
    "anarchism",
    "apache2-doc",
    "aptitude-doc-en",
    "debian-faq",
    "debian-history",
    "debian-policy",
    "debian-reference-en",
    "developers-reference",
    "exim4-doc-html",
    "fortunes",
    "git-doc",
    "gnome-user-docs",
    "harden-doc",
    "installation-guide-amd64",
    "jargon-text",
    "maint-guide",
    "octave-doc",
    "perl-doc",
    "postgresql-doc-15",
    "python-django-doc",
    "python-sqlalchemy-doc",
    "python3.11-doc",
    "sphinx-doc",
    "sqlite3-doc",
    "vim-doc",
    "zsh-doc",
)
HELDOUT_PACKAGE = "debian-handbook"
MOST_OF_A_PACKAGE = 4_000_000


def default() -> Path:
    """Where the corpus is kept once it is built."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "saccade" / "corpus" / "lm.txt"


def build(out: Path, packages: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """English prose (ASCII) from Debian documentation packages into `out`; returns {package: version}."""
    missing = [tool for tool in ("apt-get", "dpkg-deb") if shutil.which(tool) is None]
    if missing:
        raise RuntimeError(
            f"zoo: building the corpus needs a Debian machine, and there is no {' or '.join(missing)} here: "
            "give a text file of your own as corpus="
        )
    seen: set[str] = set()
    versions, parts = {}, []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for package in packages:
            _run(["apt-get", "download", package], folder)
            (deb,) = folder.glob(f"{package}_*.deb")
            versions[package] = _run(["dpkg-deb", "-f", deb.name, "Version"], folder).strip()
            _run(["dpkg-deb", "-x", deb.name, package], folder)
            parts.append(_prose(folder / package, seen)[:MOST_OF_A_PACKAGE])
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n\n".join(parts), encoding="ascii")
    out.with_suffix(".json").write_text(json.dumps(versions, indent=1))
    return versions


def _run(command: list[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(
            f"zoo: `{' '.join(command)}` failed: {done.stderr.strip()}. "
            "Run `apt-get update` first, or give a text file of your own as corpus="
        )
    return done.stdout


def _prose(folder: Path, seen: set[str]) -> str:
    """English documents under a folder as plain text, without paragraphs (menus, licences) already seen."""
    documents = []
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path.is_symlink():
            continue
        raw = partial(path.read_text, encoding="utf-8", errors="replace")
        if ".html" in path.name and path.suffix != ".gz":
            document = html_to_text(raw())
        elif path.suffix == ".pod":
            document = re.sub(r"^=\w+ ?", "", re.sub(r"[A-Z]<+ ?(.*?) ?>+", r"\1", raw()), flags=re.M)
        elif path.suffix == ".page":
            document = html_to_text(raw())
        elif path.parent.name == "fortunes" and not path.suffix:
            document = raw().replace("\n%\n", "\n\n")
        else:
            continue
        if not _is_english(document):
            continue
        paragraphs = [" ".join(p.split()) for p in re.split(r"\n\s*\n", document)]
        fresh = [p for p in map(_ascii, paragraphs) if p and p not in seen]
        seen.update(fresh)
        documents.append("\n".join(fresh))
    # A package's cap must not keep only the documents whose names come first.
    random.Random(folder.name).shuffle(documents)
    return "\n\n".join(documents)


def _is_english(document: str) -> bool:
    words = re.findall(r"[a-z]+", document.lower())
    common = sum(word in {"the", "of", "and", "to", "is", "in", "that"} for word in words)
    return len(words) > 100 and common > 0.12 * len(words)


def _ascii(paragraph: str) -> str:
    for fancy, plain in (("\u2018\u2019", "'"), ("\u201c\u201d", '"'), ("\u2010\u2011\u2013\u2014", "-")):
        paragraph = re.sub(f"[{fancy}]", plain, paragraph)
    return unicodedata.normalize("NFKD", paragraph).encode("ascii", "ignore").decode()


class _Text(HTMLParser):
    """Text of a page, a blank line between blocks."""

    HIDDEN = frozenset({"script", "style", "nav", "head"})
    BLOCKS = frozenset(
        {"p", "div", "section", "h1", "h2", "h3", "h4", "h5", "h6", "title", "pre", "br"}
        | {"li", "dt", "dd", "ul", "ol", "dl", "table", "tr", "item", "note", "steps"}
    )

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.parts = 0, [""]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.hidden += tag in self.HIDDEN
        if tag in self.BLOCKS:
            self.parts.append("\n\n")

    def handle_endtag(self, tag: str) -> None:
        self.hidden = max(0, self.hidden - (tag in self.HIDDEN))
        if tag in self.BLOCKS:
            self.parts.append("\n\n")

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.parts.append(data)


def html_to_text(page: str) -> str:
    """What a reader of the page sees, a blank line between blocks."""
    parser = _Text()
    parser.feed(page)
    return "".join(parser.parts)
