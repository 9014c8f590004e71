"""The guard in front of Gradio, over a small application; and the UI's requests on behalf of its visitor."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

import httpx
import limits
import pytest
from conftest import RunningApp
from starlette.types import Receive, Scope, Send

from stable_diffusion_server.ui.asgi_transport import StreamingASGITransport
from stable_diffusion_server.ui.client import ApiClient, RefusedError, ServerAddress, UiRequest
from stable_diffusion_server.ui.gradio_events import EVENT_BYTES, STREAMS, GradioEvent, GradioGuard

pytestmark = pytest.mark.slow

BASE = "http://127.0.0.1:8000"
EVENT = "/ui/gradio_api/queue/join"
NEWS = "/ui/gradio_api/queue/data"


class Framework:
    """An application that answers everything and records its requests."""

    def __init__(self) -> None:
        self.seen: list[tuple[Scope, bytes]] = []
        self.goes_on = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = (await receive()).get("body", b"") if scope["method"] == "POST" else b""
        self.seen.append((scope, body))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"open", "more_body": True})
        if "heartbeat" in scope["path"]:
            await self.goes_on.wait()
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def guarded(framework: Framework, rate: str = "") -> httpx.AsyncClient:
    events = {1: GradioEvent(("text",), frozenset({2}))}
    guard = GradioGuard(framework, events, lambda scope: scope["client"][0], limits.parse(rate) if rate else None)
    return httpx.AsyncClient(transport=StreamingASGITransport(guard), base_url=BASE)


def event(text: str = "a", **more: Any) -> bytes:
    body = {"data": [text], "event_data": None, "fn_index": 1, "trigger_id": 2, "session_hash": "abc", **more}
    return json.dumps(body).encode()


@pytest.mark.fault(104)
async def test_what_gets_to_the_framework_is_built_again() -> None:
    """The body without unknown members, only allowed headers, no query; the session name is tied to the visitor."""
    framework = Framework()
    client = guarded(framework)
    odd = {"x-forwarded-host": "evil.example", "x-gradio-user": "a", "authorization": "Bearer b", "cookie": "studio=c"}
    answer = await client.post(f"{EVENT}?oauth=1", content=event(batched=True, username="x"), headers=odd)
    assert answer.status_code == 200
    scope, body = framework.seen.pop()
    names = {name for name, _ in scope["headers"]}
    assert names.isdisjoint({b"x-forwarded-host", b"x-gradio-user", b"authorization"})
    assert (b"cookie" in names, scope["query_string"]) == (True, b"")
    passed = json.loads(body)
    assert set(passed) == {"data", "event_data", "fn_index", "trigger_id", "session_hash"}
    await client.get(NEWS, params={"session_hash": "abc", "other": "1"})
    await client.get(NEWS, params={"session_hash": "abc"}, extensions={"client": ServerAddress("203.0.113.9")})
    own, other = (scope["query_string"].decode() for scope, _ in framework.seen)
    assert (own == f"session_hash={passed['session_hash']}", own != other, "abc" in own) == (True, True, False)
    for query in (
        "",
        "session_hash=",
        "session_hash=a&session_hash=b",
        "session_hash=../a",
        "session_hash=" + "a" * 65,
    ):
        assert (await client.get(f"{NEWS}?{query}")).status_code == 422


@pytest.mark.fault(102)
async def test_events_and_streams_of_a_visitor_are_bounded() -> None:
    """At each limit it works, above it 413 or 429 with Retry-After; another visitor is unaffected."""
    framework = Framework()
    client = guarded(framework, "4/minute")
    space = EVENT_BYTES - len(event(""))
    assert (await client.post(EVENT, content=event("x" * space))).status_code == 200
    assert (await client.post(EVENT, content=event("x" * (space + 1)))).status_code == 413
    assert [(await client.post(EVENT, content=event())).status_code for _ in range(3)] == [200, 200, 429]
    other = {"client": ServerAddress("203.0.113.9")}
    assert (await client.post(EVENT, content=event(), extensions=other)).status_code == 200

    beat = "/ui/gradio_api/heartbeat/abc"
    streams = [client.stream("GET", beat) for _ in range(STREAMS)]
    assert {(await stream.__aenter__()).status_code for stream in streams} == {200}
    refused = await client.get(beat)
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "5")
    async with client.stream("GET", beat, extensions=other) as answer:
        assert answer.status_code == 200
    framework.goes_on.set()
    for stream in streams:
        await stream.__aexit__(None, None, None)
    assert (await client.get(beat)).status_code == 200


@pytest.mark.fault(191)
@pytest.mark.parametrize("step", [-3_600.0, -90_000.0, 90_000.0, -4e8, 4e8])
async def test_a_step_of_the_clock_shuts_nobody_out_of_the_studio(monkeypatch: pytest.MonkeyPatch, step: float) -> None:
    """Events count for the length of their window, whatever the system time; nobody is admitted early."""
    client = guarded(Framework(), "2/second")
    assert [(await client.post(EVENT, content=event())).status_code for _ in range(2)] == [200, 200]
    right = time.time
    monkeypatch.setattr(time, "time", lambda: right() + step)
    refused = await client.post(EVENT, content=event())
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
    await asyncio.sleep(1.1)
    assert (await client.post(EVENT, content=event())).status_code == 200


def api_client_of(running_app: RunningApp, client: ServerAddress) -> ApiClient:
    return ApiClient(httpx.AsyncClient(transport=StreamingASGITransport(running_app.client.app)), BASE, client=client)


async def status_of(asked: Any) -> int:
    try:
        await asked
    except RefusedError as error:
        return error.status
    return 200


@pytest.mark.fault(107)
async def test_a_stranger_is_one_by_way_of_the_ui_too(running_app: RunningApp) -> None:
    """A page acts with its visitor's rights: a remote client, or one behind an untrusted proxy, is not the operator."""
    clients = [ServerAddress(), ServerAddress("203.0.113.5"), ServerAddress("127.0.0.1", forwarded=True)]
    assert [await status_of(api_client_of(running_app, client).jobs()) for client in clients] == [200, 403, 403]
    assert [await status_of(api_client_of(running_app, client).history()) for client in clients] == [200, 403, 403]


@pytest.mark.fault(107)
async def test_what_a_page_draws_counts_for_its_visitor(run_app: Callable[..., RunningApp]) -> None:
    """With ALLOW_ANONYMOUS each address has its own rate, not that of the machine that runs the UI."""
    running_app = run_app(allow_anonymous=True, rate_limit="1/minute")
    wanted = UiRequest("/create_and_upload_image", {"prompt": "a red square", "width": "8", "height": "64"})
    clients = [
        ServerAddress("203.0.113.6"),
        ServerAddress("203.0.113.6"),
        ServerAddress("203.0.113.7"),
        ServerAddress(),
    ]
    assert [await status_of(api_client_of(running_app, client).start(wanted)) for client in clients] == [
        422,
        429,
        422,
        422,
    ]


@pytest.mark.fault(107)
@pytest.mark.parametrize("job_id", ["../history", "a/../../files/x", "a?b", "", "a" * 129, "a\nb"])
async def test_a_job_id_from_a_page_leads_nowhere_else(running_app: RunningApp, job_id: str) -> None:
    """A page must return a valid job id, otherwise there is no such job."""
    api = ApiClient(httpx.AsyncClient(transport=StreamingASGITransport(running_app.client.app)), BASE)
    for asked in (api.job(job_id), api.cancel(job_id), anext(api.events(job_id))):
        with pytest.raises(RefusedError) as refused:
            await asked
        assert refused.value.status == 404
