"""The way into the studio: opens it when someone first asks, wants a key where one is needed, guards its pages."""

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
from stable_diffusion_server.ui.client import RefusedError
from stable_diffusion_server.ui.client_factory import COOKIE, ApiClients, client_of
from stable_diffusion_server.ui.problems import problem
from stable_diffusion_server.ui.request_body import read_body
from stable_diffusion_server.ui.upload_routes import UploadRoutes

_log = structlog.get_logger(__name__)

_DAY = 86_400
_KEY_BYTES = 4096
_FORM = "application/x-www-form-urlencoded"
_WRONG = "This is no key of this server."
# As keys are written in the settings: what a header can carry.
_KEY = re.compile(r"[!-~]+")
_PAGES = ("/ui", "/ui/")
# What a browser says it wants when someone opens a page; programs say nothing.
_OPENING = ("", "document")


class LazyUiApp:
    """ASGI application for everything under `/ui`.

    `build` imports Gradio and makes the studio, which takes seconds: on a thread, when someone first asks, so that a
    server nobody looks at pays nothing. `desks` lead back to the server; with `keyed`, a visitor
    shows a key first. Pictures that visitors send go to `uploads`, and never to Gradio. Pictures may also be shown from
    `sources`, the bucket's origins.
    """

    def __init__(
        self,
        build: Callable[[], FastAPI],
        desks: ApiClients,
        uploads: UploadRoutes,
        *,
        keyed: bool,
        sources: Collection[str] = (),
    ) -> None:
        self._build = build
        self._desks = desks
        self._uploads = uploads
        self._keyed = keyed
        self._headers = _headers(sources)
        self._studio: FastAPI | None = None
        self._fault = ""
        self._opening: asyncio.Task[None] | None = None
        self._closing = asyncio.Event()
        self._under_way: set[asyncio.Task[None]] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        request = Request(scope, receive)
        if self._keyed and (refused := await self._checked(request)) is not None:
            await refused(scope, receive, send)
        elif self._uploads.answers(request.url.path):
            await (await self._uploads.answer(request, self._desks.owner_of(request)))(scope, receive, send)
        elif self._studio is None:
            await self._opened(request)(scope, receive, send)
        else:
            scope.setdefault("state", {})["owner"] = self._desks.owner_of(request)
            await self._shown(self._studio, scope, receive, send)

    def drain(self) -> None:
        """End what is under way, from the event loop: pages listen for as long as they are open."""
        self._closing.set()
        for task in self._under_way:
            task.cancel()

    async def close(self) -> None:
        """Let the studio go."""
        self.drain()
        if self._opening is not None:
            with suppress(Exception):
                await self._opening

    async def _checked(self, request: Request) -> Response | None:
        """What is answered to who has no key; `None` for who has."""
        if self._desks.guests.key_of(request.cookies.get(COOKIE, "")) is not None:
            return None
        if request.method != "POST" or request.url.path != "/ui/key":
            return static_pages.key_wanted()
        try:
            key = await _key_sent(request)
            await self._desks.at(str(request.base_url), key, client_of(request)).jobs()
        except RefusedError as error:
            wrong = error.status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN)
            return static_pages.key_wanted(_WRONG if wrong else error.detail)
        except ServerError as error:
            return static_pages.key_wanted(error.detail)
        answer = RedirectResponse("/ui/", HTTPStatus.SEE_OTHER)
        secure = request.url.scheme == "https"
        token = self._desks.guests.start(key)
        answer.set_cookie(COOKIE, token, max_age=_DAY, path="/ui", secure=secure, httponly=True, samesite="strict")
        return answer

    def _opened(self, request: Request) -> Response:
        """What is answered while there is no studio. Only who opens a page has it built: no picture, no script."""
        if request.method != "GET" or request.url.path not in _PAGES:
            return problem(NotFound("There is nothing here before the page is opened."))
        if request.headers.get("sec-fetch-dest", "") not in _OPENING:
            return problem(Forbidden("The page is not opened as a part of another one."))
        if self._fault:
            return static_pages.closed(self._fault)
        if self._opening is None:
            ready = asyncio.Event()
            self._opening = asyncio.create_task(self._open(ready))
        return static_pages.opening()

    async def _open(self, ready: asyncio.Event) -> None:
        """Build the studio, and keep it open until the server ends."""
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

    async def _shown(self, studio: FastAPI, scope: Scope, receive: Receive, send: Send) -> None:
        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in self._headers.items():
                    headers[name] = value
            await send(message)

        task = asyncio.create_task(_run(studio, scope, receive, guarded))
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)
        try:
            await task
        except asyncio.CancelledError:
            if not self._closing.is_set():
                task.cancel()
                raise


async def _run(studio: FastAPI, scope: Scope, receive: Receive, send: Send) -> None:
    await studio({**scope, "app": studio}, receive, send)


async def _key_sent(request: Request) -> str:
    """The key in the form of the page that asks for one. Raises a `ServerError` whose sentence is for people."""
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
    """What browsers are told of the studio's pages: nothing comes from elsewhere, and nothing goes there."""
    pictures = " ".join(["'self'", "data:", "blob:", *sorted(sources)])
    policy = (
        "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
        f"img-src {pictures}; media-src 'self' blob: data:; font-src 'self' data:; connect-src 'self' data: blob:; "
        "worker-src 'self' blob:; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
    )
    return {"Content-Security-Policy": policy, "X-Frame-Options": "DENY"}
