"""The lazy UI application, over a small UI: loading on first use, keys, headers, shutdown."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import asynccontextmanager

import httpx
import numpy as np
import pytest
from conftest import RunningApp
from fakes import until
from fastapi import FastAPI, Request, Response
from numpy.typing import NDArray
from starlette.responses import StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from stable_diffusion_server.ui.app import LazyUiApp
from stable_diffusion_server.ui.asgi_transport import StreamingASGITransport
from stable_diffusion_server.ui.client import ApiClients
from stable_diffusion_server.ui.image_intake import ImageIntake, UploadRoutes
from stable_diffusion_server.ui.upload_store import UploadStore

pytestmark = pytest.mark.slow

BASE = "http://127.0.0.1:8000"


def small_studio(opened: list[str]) -> FastAPI:
    @asynccontextmanager
    async def lifespan(app: FastAPI):  # type: ignore[no-untyped-def]  # a fixture's own generator
        opened.append("open")
        yield
        opened.append("closed")

    studio = FastAPI(lifespan=lifespan)

    @studio.get("/ui/")
    async def page() -> str:
        return "the studio"

    @studio.get("/ui/listen")
    async def listen() -> Response:
        async def endless():  # type: ignore[no-untyped-def]  # a fixture's own generator
            yield b"listening"
            await asyncio.sleep(600)

        return StreamingResponse(endless())

    return studio


def server_with(keys: dict[str, str]) -> FastAPI:
    """A server with API keys, as far as the UI app uses it."""
    server = FastAPI()

    @server.get("/jobs")
    async def jobs(request: Request) -> Response:
        known = request.headers.get("authorization", "").removeprefix("Bearer ") in keys
        return Response('{"jobs": []}' if known else '{"detail": "no key"}', 200 if known else 401)

    return server


def request_with(cookies: str) -> Request:
    headers = [(b"host", b"127.0.0.1:8000"), (b"cookie", cookies.encode())]
    return Request({"type": "http", "method": "GET", "path": "/ui/", "query_string": b"", "headers": headers})


async def opened(entrance: LazyUiApp, client: httpx.AsyncClient) -> httpx.Response:
    """The UI's first response."""
    for _ in range(2000):
        if "the studio" in (answer := await client.get("/ui/")).text:
            break
        await asyncio.sleep(0.01)
    return answer


def entrance_of(build: Callable[[], FastAPI], desks: ApiClients, *, keyed: bool) -> LazyUiApp:
    async def no_decoder(data: bytes, field: str, *, share: str) -> NDArray[np.uint8]:
        raise AssertionError("these tests send no pictures")

    return LazyUiApp(build, desks, UploadRoutes(ImageIntake(no_decoder, UploadStore(), 1024)), keyed=keyed)


def visitor(app: ASGIApp) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=StreamingASGITransport(app), base_url=BASE)


async def test_it_is_built_when_someone_asks_and_lets_go_at_the_end() -> None:
    """Built on first request; until then a page reloads itself; at shutdown listening pages are closed."""
    events: list[str] = []
    desks = ApiClients(visitor(server_with({})))
    entrance = entrance_of(lambda: small_studio(events), desks, keyed=False)
    assert events == []
    client = visitor(entrance)
    first = await client.get("/ui")
    assert (first.status_code, 'http-equiv="refresh"' in first.text) == (200, True)
    answer = await opened(entrance, client)
    assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
    assert "connect-src 'self'" in answer.headers["content-security-policy"]
    async with client.stream("GET", "/ui/listen") as stream:
        parts = stream.aiter_bytes()
        assert await anext(parts) == b"listening"
        await entrance.close()
        assert [part async for part in parts] == []
    assert events == ["open", "closed"]


async def test_a_studio_that_cannot_be_opened_says_so() -> None:
    """503 and one sentence, not an endless wait."""

    def broken() -> FastAPI:
        raise ImportError("no gradio here")

    client = visitor(entrance_of(broken, ApiClients(visitor(server_with({}))), keyed=False))
    for _ in range(1000):
        answer = await client.get("/ui/")
        if answer.status_code == 503:
            break
    assert "ImportError" in answer.text
    assert "no gradio here" not in answer.text


async def test_behind_keys_nothing_is_shown_before_one_is() -> None:
    """Every path returns the login page; a wrong key is refused; the right one sets a cookie that is not the key."""
    desks = ApiClients(visitor(server_with({"right": "ann"})))
    entrance = entrance_of(lambda: small_studio([]), desks, keyed=True)
    client = visitor(entrance)
    for path in ("/ui", "/ui/", "/ui/listen", "/ui/gradio_api/upload"):
        asked = await client.get(path)
        assert (asked.status_code, 'type="password"' in asked.text) == (401, True)
    wrong = await client.post("/ui/key", data={"key": "wrong"})
    assert (wrong.status_code, "set-cookie" in wrong.headers) == (403, False)
    long = await client.post("/ui/key", data={"key": "x" * 10_000})
    assert long.status_code == 403
    right = await client.post("/ui/key", data={"key": "right"})
    cookie = right.headers["set-cookie"]
    assert (right.status_code, right.headers["location"]) == (303, "/ui/")
    assert "HttpOnly" in cookie
    assert "samesite=strict" in cookie.lower()
    assert "right" not in cookie
    await opened(entrance, client)
    shown = "; ".join(f"{name}={value}" for name, value in client.cookies.items())
    assert desks.of(request_with(shown)).key == "right"
    assert desks.of(request_with("studio=another")).key == ""
    await entrance.close()


def test_the_gate_lets_pages_through_and_nothing_else(run_app: Callable[..., RunningApp]) -> None:
    """With keys, the UI has its own login; a link may open the page, and no other site may post to it."""
    running_app = run_app(api_keys=("a-secret-key",))
    assert 'type="password"' in running_app.client.get("/ui").text
    elsewhere = {"sec-fetch-site": "cross-site", "origin": "https://evil.example"}
    assert running_app.client.get("/ui/", headers={"sec-fetch-site": "cross-site"}).status_code == 401
    assert running_app.client.post("/ui/key", data={"key": "a-secret-key"}, headers=elsewhere).status_code == 403
    answer = running_app.client.post("/ui/key", data={"key": "a-secret-key"}, follow_redirects=False)
    assert answer.status_code == 303
    assert running_app.client.get("/history").status_code == 401


def test_without_keys_strangers_see_no_studio(run_app: Callable[..., RunningApp]) -> None:
    """A remote client gets the name of the setting; UI=0 omits the UI."""
    running_app = run_app(client=("203.0.113.5", 5))
    assert running_app.client.get("/ui").status_code == 403
    assert run_app(ui=False).client.get("/ui").status_code == 404


@pytest.mark.parametrize("body", [b"", b"x" * 100_000])
async def test_a_request_inside_the_process_is_answered_while_it_is_made(body: bytes) -> None:
    """The first chunk arrives before the last is produced; a client that closes early cancels the work."""
    goes_on, ended = asyncio.Event(), threading.Event()

    async def app(scope, receive, send):  # type: ignore[no-untyped-def]  # ASGI signature
        message = await receive()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"x-query", scope["query_string"])]})
        await send({"type": "http.response.body", "body": str(len(message["body"])).encode(), "more_body": True})
        try:
            await goes_on.wait()
            await send({"type": "http.response.body", "body": b"!", "more_body": False})
        finally:
            ended.set()

    client = visitor(app)
    async with client.stream("POST", "/a b?c=d", content=body) as answer:
        parts = answer.aiter_bytes()
        assert await anext(parts) == str(len(body)).encode()
        goes_on.set()
        assert [part async for part in parts] == [b"!"]
        assert answer.headers["x-query"] == "c=d"
    goes_on.clear()
    ended.clear()
    async with client.stream("POST", "/", content=body) as answer:
        await anext(answer.aiter_bytes())
    until(ended.is_set)


BOUNDARY = b'--x\r\nContent-Disposition: form-data; name="key"; filename="k"\r\n\r\nsecret\r\n--x--\r\n'
ODD_KEYS: dict[str, tuple[str, bytes]] = {
    "beyond ASCII": ("application/x-www-form-urlencoded", b"key=%C3%A4"),
    "half a surrogate pair": ("application/x-www-form-urlencoded", b"key=%ED%A0%80"),
    "bytes that are no UTF-8": ("application/x-www-form-urlencoded", b"key=\xff\xfe"),
    "line breaks": ("application/x-www-form-urlencoded", b"key=a%0D%0AX-Evil:%201"),
    "NUL": ("application/x-www-form-urlencoded", b"key=%00"),
    "none": ("application/x-www-form-urlencoded", b""),
    "many fields": ("application/x-www-form-urlencoded", b"&".join(b"key=%d" % n for n in range(99))),
    "a file": ("multipart/form-data; boundary=x", BOUNDARY),
    "no boundary": ("multipart/form-data", BOUNDARY),
    "a boundary of line breaks": ("multipart/form-data; boundary=%0d%0a", BOUNDARY),
    "JSON": ("application/json", b'{"key": "a"}'),
    "no type": ("", b"key=wrong"),
    "too long": ("application/x-www-form-urlencoded", b"key=" + b"x" * 100_000),
}


@pytest.mark.fault(105)
@pytest.mark.parametrize("name", ODD_KEYS)
def test_an_odd_form_with_a_key_is_refused(run_app: Callable[..., RunningApp], name: str) -> None:
    """Any invalid key from a remote client: 403 and the login page, no traceback, no cookie.

    A body over the limit of its route is refused before anything reads it, so it gets no login page.
    """
    kind, body = ODD_KEYS[name]
    headers = {"content-type": kind} if kind else {}
    answer = run_app(api_keys=("a-secret-key",)).client.post("/ui/key", content=body, headers=headers)
    refused = 413 if name == "too long" else 403
    assert (answer.status_code, "set-cookie" in answer.headers) == (refused, False)
    if refused == 413:
        assert answer.json()["type"].endswith(":too-large")
    else:
        assert 'type="password"' in answer.text


@pytest.mark.fault(105)
@pytest.mark.parametrize(
    "headers",
    [{"x-api-key": "ä"}, {"authorization": "Bearer \udcff"}, {"authorization": "Basic w6Q="}, {"cookie": "studio=ä"}],
    ids=["key", "bearer", "basic", "cookie"],
)
def test_a_secret_beyond_ascii_is_compared_and_refused(
    run_app: Callable[..., RunningApp], headers: dict[str, str]
) -> None:
    """In any header: 401, not an exception in the comparison."""
    running_app = run_app(api_keys=("a-secret-key",))
    raw = [(name.encode(), value.encode("utf-8", "surrogateescape")) for name, value in headers.items()]
    for path in ("/jobs", "/ui/"):
        assert running_app.client.get(path, headers=raw).status_code == 401
    assert running_app.client.get("/files/x.webp?expires=1&signature=%C3%A4").status_code == 404


@pytest.mark.fault(106)
@pytest.mark.parametrize("wanted", ["image", "script", "iframe", "empty", "style"])
async def test_a_part_of_another_page_opens_nothing(wanted: str) -> None:
    """An image, script, frame or fetch request for the page: refused, and Gradio is not loaded."""
    events: list[str] = []
    entrance = entrance_of(lambda: small_studio(events), ApiClients(visitor(server_with({}))), keyed=False)
    client = visitor(entrance)
    assert (await client.get("/ui/", headers={"sec-fetch-dest": wanted})).status_code == 403
    for method, path in (("GET", "/ui/theme.css"), ("POST", "/ui/"), ("HEAD", "/ui"), ("GET", "/ui/gradio_api/info")):
        assert (await client.request(method, path)).status_code == 404
    await asyncio.sleep(0.05)
    assert events == []
    assert (await client.get("/ui/", headers={"sec-fetch-dest": "document"})).status_code == 200
    await opened(entrance, client)
    assert events == ["open"]
    await entrance.close()


async def test_who_leaves_a_long_answer_half_read_is_not_kept() -> None:
    """More data is pending than the read-ahead holds: the server side still ends at once."""
    ended = asyncio.Event()

    async def long(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            for _ in range(1000):
                await send({"type": "http.response.body", "body": b"part", "more_body": True})
        finally:
            ended.set()

    began = asyncio.get_running_loop().time()
    async with asyncio.timeout(5):
        async with visitor(long).stream("GET", "/") as answer:
            await anext(answer.aiter_raw())
            await asyncio.sleep(0.05)
        await ended.wait()
    assert asyncio.get_running_loop().time() - began < 4
