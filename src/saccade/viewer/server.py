"""The page's server: on loopback alone, behind a random token, under a strict content policy.

No request names a file: the page's own parts are read once at the start, all else is computed.
"""

from __future__ import annotations

import secrets
import socket
from collections.abc import Callable
from importlib.resources import files
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse
from starlette.concurrency import run_in_threadpool
from starlette.middleware.trustedhost import TrustedHostMiddleware

from ..core.errors import SpecError
from .export import page
from .session import Session

HOST = "127.0.0.1"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data: blob:;"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
KINDS = {"html": "text/html", "js": "text/javascript", "css": "text/css"}
LARGEST = 2**20  # bytes of a request's body


def application(session: Session, token: str) -> FastAPI:
    """The page as an application whose every address begins with the token."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    parts = {
        part.name: (part.read_bytes(), KINDS[part.name.rpartition(".")[2]])
        for part in files(__package__).joinpath("static").iterdir()
    }

    @app.middleware("http")
    async def guard(request: Request, call_next: Callable[..., Any]) -> Response:
        given = request.url.path.removeprefix("/").partition("/")[0]
        if secrets.compare_digest(given.encode(), token.encode()):
            response: Response = await call_next(request)
        else:
            response = Response("the link's token is missing or wrong\n", 403)
        response.headers.update(HEADERS)
        return response

    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"], www_redirect=False)

    @app.get("/{_token}/")
    def index() -> Response:
        return Response(*parts["index.html"][:1], media_type="text/html")

    @app.get("/{_token}/static/{name}")
    def static(name: str) -> Response:
        if name not in parts:
            return Response(status_code=404)
        content, kind = parts[name]
        return Response(content, media_type=kind)

    @app.get("/{_token}/data/{name}")
    def data(name: str, request: Request) -> Response:
        try:
            found = session.answer(f"{name}?{request.url.query}")
        except SpecError as error:
            return Response(str(error), 422)
        return Response(found, media_type="application/octet-stream")

    @app.post("/{_token}/export")
    async def export(request: Request) -> Response:
        body = b""
        async for piece in request.stream():
            body += piece
            if len(body) > LARGEST:
                return Response(f"the request is larger than {LARGEST} bytes", 413)
        try:
            return HTMLResponse(await run_in_threadpool(page, session, body.decode().split()))
        except (SpecError, UnicodeDecodeError) as error:
            return Response(str(error), 422)

    return app


class Server:
    """A session on a port of this machine: ``link`` opens it, ``run`` serves until interrupted."""

    def __init__(self, session: Session, port: int = 0):
        self.session, self.token = session, secrets.token_urlsafe(24)
        self._socket = socket.create_server((HOST, port))
        self.link = f"http://{HOST}:{self._socket.getsockname()[1]}/{self.token}/"
        config = uvicorn.Config(application(session, self.token), log_level="warning", access_log=False, ws="none")
        self._server = uvicorn.Server(config)
        self._stopped = False

    def run(self) -> None:
        """Serve until :meth:`stop`, or until Ctrl-C, which is a KeyboardInterrupt here."""
        self.session.start()
        try:
            self._server.run(sockets=[self._socket])
        finally:
            self.session.close()
            self._socket.close()
        if not self._stopped:  # a signal ended it, and not always does uvicorn raise it again
            raise KeyboardInterrupt

    def stop(self) -> None:
        """Let :meth:`run` end."""
        self._stopped = self._server.should_exit = True
