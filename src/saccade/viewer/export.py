"""One HTML file for sharing: the page, its style, its script and what was asked for, without a server."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
from collections.abc import Iterable
from importlib.resources import files

from ..core.errors import SpecError
from .session import Session

MODULES = ("data.js", "map.js", "panels.js", "viewer.js")  # in the order in which they need one another
LARGEST = 256 * 2**20  # bytes of data in one file


def page(session: Session, keys: Iterable[str]) -> str:
    """The page with the answers to some requests inside; it shows these and says of others that they are not there.

    Args:
        keys: requests as :meth:`Session.answer` takes them; what the page needs to open is always there.

    Raises:
        SpecError: a request that the session cannot answer, or more than 256 MB.
    """
    everywhere = ["session", *glances(session)]
    held: dict[str, str] = {}
    size = 0
    for key in dict.fromkeys([*everywhere, *keys]):
        answer = session.answer(key)
        size += len(answer)
        if size > LARGEST:
            raise SpecError(
                f"what is asked for is larger than {LARGEST >> 20} MB: show less of the map, or fewer heads"
            )
        held[key] = base64.b64encode(gzip.compress(answer, 6, mtime=0)).decode()
    static = files(__package__).joinpath("static")
    style = static.joinpath("viewer.css").read_text()
    script = "\n".join(_inlined(static.joinpath(name).read_text()) for name in MODULES)
    data = json.dumps(held).replace("<", "\\u003c")
    policy = (
        f"default-src 'none'; script-src '{_digest(script)}'; style-src '{_digest(style)}'; img-src data: blob:;"
        " base-uri 'none'; form-action 'none'"
    )
    html = static.joinpath("index.html").read_text()
    html = html.replace("<head>", f'<head>\n<meta http-equiv="Content-Security-Policy" content="{policy}">', 1)
    html = re.sub(r'<link rel="stylesheet"[^>]*>', lambda _: f"<style>{style}</style>", html)
    html = re.sub(r'<script type="module"[^>]*></script>', "", html)
    parts = f'<script type="application/json" id="held">{data}</script>\n<script type="module">{script}</script>'
    return html.replace("</body>", f"{parts}\n</body>")


def glances(session: Session) -> list[str]:
    """The requests for all thumbnails."""
    told = json.loads(session.session())
    sides, layers = range(len(told["sides"])), range(len(told["layers"]))
    return [f"glance?side={s}&layer={y}&stat={stat}" for s in sides for y in layers for stat in ("mass", "most")]


def _inlined(module: str) -> str:
    """A module's text without its imports and the word export: all modules share one scope."""
    return re.sub(r"^export ", "", re.sub(r"^import .*;\n", "", module, flags=re.M), flags=re.M)


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
