"""ASGI application of the UI: loads Gradio on first use, asks for an API key, sets security headers."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Collection
from contextlib import suppress
from http import HTTPStatus
from urllib.parse import parse_qs

import structlog
from fastapi import FastAPI
from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.types import Message, Receive, Scope, Send

from stable_diffusion_server.errors import (
    Forbidden,
    InvalidInput,
    MalformedRequest,
    NotFound,
    ServerError,
    UnsupportedMedia,
)
from stable_diffusion_server.ui import static_pages
from stable_diffusion_server.ui.asgi_transport import problem_response, read_body
from stable_diffusion_server.ui.client import COOKIE, ApiClients, RefusedError, address_of
from stable_diffusion_server.ui.image_intake import UploadRoutes
from stable_diffusion_server.ui.sessions import SESSION_SECONDS

_log = structlog.get_logger(__name__)

_KEY_BYTES = 4096
_FORM = "application/x-www-form-urlencoded"
_WRONG = "This is no key of this server."
# Printable ASCII, the characters that a header can contain; same as in settings/auth.py.
_KEY = re.compile(r"[!-~]+")
_PAGES = ("/ui", "/ui/")
# Values of Sec-Fetch-Dest when a person opens a page; programs do not send the header.
_OPENS_PAGE = ("", "document")


class LazyUiApp:
    """ASGI application for everything under `/ui`.

    `build` imports Gradio and creates the pages, which takes seconds. It runs on a thread when a visitor first opens
    the UI. `clients` call the server's API; with `keyed`, a visitor must enter an API key first. Images that visitors
    upload go to `uploads` and never to Gradio. Pages may show images from `sources`, the bucket's origins.
    """

    def __init__(
        self,
        build: Callable[[], FastAPI],
        clients: ApiClients,
        uploads: UploadRoutes,
        *,
        keyed: bool,
        sources: Collection[str] = (),
    ) -> None:
        self._build = build
        self._clients = clients
        self._uploads = uploads
        self._keyed = keyed
        self._headers = _headers(sources)
        self._studio: FastAPI | None = None
        self._fault = ""
        self._opening: asyncio.Task[None] | None = None
        self._closing = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        request = Request(scope, receive)
        if self._keyed and (refused := await self._login_response(request)) is not None:
            await refused(scope, receive, send)
        elif self._uploads.answers(request.url.path):
            await (await self._uploads.answer(request, self._clients.owner_of(request)))(scope, receive, send)
        elif self._studio is None:
            await self._loading_response(request)(scope, receive, send)
        else:
            scope.setdefault("state", {})["owner"] = self._clients.owner_of(request)
            await self._forward(self._studio, scope, receive, send)

    def drain(self) -> None:
        """Cancel running requests, because open pages keep their streams open. Call it on the event loop."""
        self._closing.set()
        for task in self._tasks:
            task.cancel()

    async def close(self) -> None:
        """Close the pages and wait until they are closed."""
        self.drain()
        if self._opening is not None:
            with suppress(Exception):
                await self._opening

    async def _login_response(self, request: Request) -> Response | None:
        """Return the login response for a visitor without a session, `None` for a visitor with one."""
        if self._clients.sessions.key_of(request.cookies.get(COOKIE, "")) is not None:
            return None
        if request.method != "POST" or request.url.path != "/ui/key":
            return static_pages.key_wanted()
        try:
            key = await _submitted_key(request)
            await self._clients.at(str(request.base_url), key, address_of(request)).jobs()
        except RefusedError as error:
            wrong = error.status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN)
            return static_pages.key_wanted(_WRONG if wrong else error.detail)
        except ServerError as error:
            return static_pages.key_wanted(error.detail)
        answer = RedirectResponse("/ui/", HTTPStatus.SEE_OTHER)
        secure = request.url.scheme == "https"
        token = self._clients.sessions.start(key)
        answer.set_cookie(
            COOKIE, token, max_age=SESSION_SECONDS, path="/ui", secure=secure, httponly=True, samesite="strict"
        )
        return answer

    def _loading_response(self, request: Request) -> Response:
        """Return the response while Gradio is not loaded. Requests for pages load it, others do not."""
        if request.method != "GET" or request.url.path not in _PAGES:
            return problem_response(NotFound("There is nothing here before the page is opened."))
        if request.headers.get("sec-fetch-dest", "") not in _OPENS_PAGE:
            return problem_response(Forbidden("The page is not opened as a part of another one."))
        if self._fault:
            return static_pages.closed(self._fault)
        if self._opening is None:
            ready = asyncio.Event()
            self._opening = asyncio.create_task(self._open(ready))
        return static_pages.opening()

    async def _open(self, ready: asyncio.Event) -> None:
        """Build the pages, and keep them open until the server shuts down."""
        try:
            studio = await asyncio.to_thread(self._build)
            async with studio.router.lifespan_context(studio):
                self._studio = studio
                await self._closing.wait()
        except ModuleNotFoundError as error:
            _log.warning("studio not opened", lacking=error.name)
            self._fault = f"The studio needs {error.name}, which is not installed: docs/ui.md tells how it comes."
        except Exception as error:
            _log.exception("studio not opened")
            self._fault = f"Gradio could not be loaded ({type(error).__name__}); the server's log says more."
        finally:
            self._studio = None

    async def _forward(self, studio: FastAPI, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in self._headers.items():
                    headers[name] = value
            await send(message)

        task = asyncio.create_task(_run(studio, scope, receive, send_with_headers))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            await task
        except asyncio.CancelledError:
            if not self._closing.is_set():
                task.cancel()
                raise


async def _run(studio: FastAPI, scope: Scope, receive: Receive, send: Send) -> None:
    await studio({**scope, "app": studio}, receive, send)


async def _submitted_key(request: Request) -> str:
    """Return the API key in a submitted form. Raises a `ServerError`; the page shows its sentence."""
    body = await read_body(request.receive, _KEY_BYTES)
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != _FORM:
        raise UnsupportedMedia("A key comes from the form on this page.")
    try:
        key = parse_qs(body.decode("ascii"), max_num_fields=4).get("key", [""])[0]
    except ValueError as error:
        raise MalformedRequest("The form could not be read.") from error
    if not _KEY.fullmatch(key):
        raise InvalidInput(_WRONG)
    return key


def _headers(sources: Collection[str]) -> dict[str, str]:
    """Return security headers: pages load only from this server, images also from `sources`; they send only to it."""
    pictures = " ".join(["'self'", "data:", "blob:", *sorted(sources)])
    policy = (
        "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
        f"img-src {pictures}; media-src 'self' blob: data:; font-src 'self' data:; connect-src 'self' data: blob:; "
        "worker-src 'self' blob:; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
    )
    return {"Content-Security-Policy": policy, "X-Frame-Options": "DENY"}
