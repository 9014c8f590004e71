"""Pages and apps of other origins: preflight requests, listed and unlisted origins, hostile preflight headers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from conftest import RunningApp
from pydantic import ValidationError
from starlette.responses import PlainTextResponse
from starlette.types import Message, Scope

from stable_diffusion_server.api import CrossOriginMiddleware
from stable_diffusion_server.settings import Settings

PAGE = "https://app.example"
# What openai-node 6 sends from a page.
STAINLESS = (
    "authorization,content-type,x-stainless-os,x-stainless-lang,x-stainless-arch,x-stainless-runtime,"
    "x-stainless-runtime-version,x-stainless-package-version,x-stainless-retry-count,x-stainless-timeout,"
    "x-stainless-helper-method"
)
APPS = [
    "app://obsidian.md",
    "app://.",
    "app://-",
    "tauri://localhost",
    "capacitor://localhost",
    "ionic://localhost",
    "chrome-extension://aapbdbdomjkkjkaonfhkkikfgjllcleb",
    "moz-extension://c0f1b7f2-1f0f-4e6a-9f3e-5b8d6a9d6f60",
    "safari-web-extension://5E0C63A4-7D0C-4A2E-9B6E-7B3D6F0C1A2B",
    "vscode-webview://0a1b2c",
    "http://tauri.localhost",
    "http://localhost:5173",
    "https://[::1]:8443",
    "null",
]


def preflight(running_app: RunningApp, origin: str, headers: str = "content-type", **more: str) -> httpx.Response:
    asked = {"origin": origin, "access-control-request-method": "POST", "access-control-request-headers": headers}
    return running_app.client.options("/v1/images/generations", headers={**asked, **more})


def draw(running_app: RunningApp, **headers: str) -> httpx.Response:
    body = {"prompt": "a red square", "size": "64x64"}
    return running_app.client.post("/v1/images/generations", json=body, headers=headers)


def test_the_headers_that_a_client_asks_for_are_reflected(run_app: Callable[..., RunningApp]) -> None:
    """The headers of openai-node, and whatever another client invents; no cookies, no wildcard."""
    running_app = run_app(cors_origins=PAGE)
    for names in (STAINLESS, "x-of-tomorrow", "X-A , X-B"):
        answer = preflight(running_app, PAGE, names)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-headers"] == names
        assert answer.headers["access-control-allow-origin"] == PAGE
        assert {"GET", "POST", "DELETE"} <= set(answer.headers["access-control-allow-methods"].split(", "))
        assert "access-control-allow-credentials" not in answer.headers
        assert "Origin" in answer.headers["vary"]
    assert running_app.squares.prepared == []


def test_an_app_whose_origin_is_listed_draws(run_app: Callable[..., RunningApp]) -> None:
    """The schemes of Electron, Tauri, Capacitor, Ionic, extensions and VS Code; `null` where it is written out."""
    running_app = run_app(cors_origins=", ".join(APPS))
    for origin in APPS:
        assert preflight(running_app, origin).headers["access-control-allow-origin"] == origin
        answer = draw(running_app, origin=origin, **{"sec-fetch-site": "cross-site"})
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, origin)


STRANGERS = [
    "null",
    "https://evil.example",
    "http://app.example",
    "https://app.example.evil.example",
    "https://app.example:8443",
    "https://app.example/",
    "https://APP.example",
    "app://obsidian.md.evil",
    "app://obsidian",
    "APP://obsidian.md",
    "https://app.example, https://evil.example",
    "*",
    "",
]


def test_an_origin_that_is_not_listed_gets_nothing(run_app: Callable[..., RunningApp]) -> None:
    """403 for the preflight request and for the request, without any header that would let a page read it."""
    running_app = run_app(cors_origins=f"{PAGE}, app://obsidian.md")
    for origin in STRANGERS:
        for answer in (preflight(running_app, origin, STAINLESS), draw(running_app, origin=origin)):
            assert answer.status_code == 403, origin
            assert [name for name in answer.headers if name.startswith("access-control")] == []
    assert running_app.squares.prepared == []


def test_without_the_setting_an_app_gets_nothing(running_app: RunningApp) -> None:
    """Also `null`, and an origin that another server would list."""
    for origin in APPS:
        assert preflight(running_app, origin).status_code == 403
        assert draw(running_app, origin=origin).status_code == 403


@pytest.mark.parametrize(
    "names",
    [
        "x-a\r\nset-cookie: a=b",
        "x-a\nx-b",
        "x-a\0",
        "x a",
        "x-a;x-b",
        "x-ü",
        "*",
        "x-a, *",
        ",,,",
        "(x-a)",
        "x" * 5000,
        "x-a," * 2000,
    ],
)
def test_hostile_names_are_not_reflected(names: str) -> None:
    """What is no list of names, or a long one: 400, and none of it comes back."""
    sent = asyncio.run(_through([(b"origin", PAGE.encode()), *_asking(names)]))
    headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in sent["headers"]}
    assert sent["status"] == 400
    assert "access-control-allow-headers" not in headers
    assert all("\n" not in value and len(value) < 200 for value in headers.values())


def test_a_request_with_two_origins_has_none() -> None:
    """Browsers send one; with two, parts of a server could believe different ones."""
    both = [(b"origin", PAGE.encode()), (b"origin", b"https://evil.example")]
    sent = asyncio.run(_through([*both, *_asking("x-a")]))
    assert sent["status"] == 404  # the app behind it
    assert not [name for name, _ in sent["headers"] if name.startswith(b"access-control")]


def test_a_page_of_a_public_origin_may_reach_this_machine(run_app: Callable[..., RunningApp]) -> None:
    """Chromium asks for it by a header of its own."""
    running_app = run_app(cors_origins=PAGE)
    answer = preflight(running_app, PAGE, **{"access-control-request-private-network": "true"})
    assert answer.headers["access-control-allow-private-network"] == "true"
    assert "access-control-allow-private-network" not in preflight(running_app, PAGE).headers


@pytest.mark.parametrize(
    "origin",
    ["*", "file://", "file:///home", "https://app.example/", "https://a@app.example", "ws://app.example", "app:", "app://",
     "app://a b", "app://a/b", "https://*.app.example", "https://bücher.example", "nul", "NULL", "data:text/html"],
)  # fmt: skip
def test_what_is_no_origin_stops_the_start(origin: str) -> None:
    """One sentence that quotes it."""
    with pytest.raises(ValidationError) as refused:
        Settings(_env_file=None, cors_origins=origin)
    assert repr(origin) in str(refused.value)


def test_origins_are_kept_as_browsers_send_them() -> None:
    """Hosts of web pages in lower case and without the default port; apps as written."""
    settings = Settings(_env_file=None, cors_origins="https://App.Example:443,http://a:80,http://a:81,app://A")
    assert settings.cors_origins == ("https://app.example", "http://a", "http://a:81", "app://A")


def _asking(names: str) -> list[tuple[bytes, bytes]]:
    return [
        (b"access-control-request-method", b"POST"),
        (b"access-control-request-headers", names.encode("latin-1")),
    ]


async def _through(headers: list[tuple[bytes, bytes]]) -> dict[str, Any]:
    """The start of the response to a preflight request, sent past any HTTP client's own checks."""
    started: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request"}

    async def send(message: Message) -> None:
        started.append(message)

    scope: Scope = {"type": "http", "method": "OPTIONS", "path": "/", "query_string": b"", "headers": headers}
    await CrossOriginMiddleware(PlainTextResponse("nothing", 404), [PAGE])(scope, receive, send)
    return dict(started[0])


def test_an_unexpected_error_can_be_read_by_a_page(run_app: Callable[..., RunningApp]) -> None:
    """Its response has the headers of every other response; the page's client learns the request id from it."""
    origin = "https://app.example"
    running_app = run_app(cors_origins=origin)

    async def broken() -> None:
        raise RuntimeError("a secret of the server")

    running_app.client.app.add_api_route("/v1/broken", broken)  # type: ignore[attr-defined]  # TestClient's app
    answer = running_app.client.get("/v1/broken", headers={"Origin": origin})
    assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
    assert "secret" not in answer.text
    assert answer.headers["access-control-allow-origin"] == origin
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert len(answer.headers["x-request-id"]) > 8
    assert running_app.client.get("/healthz").status_code == 200
