"""The Model Context Protocol at /mcp, by the clients of `mcp` and `fastmcp`, against a listening server."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import fastmcp
import httpx
import httpx2
import pytest
from fakes import FakeDenoiser, disc, file_of
from fastmcp.exceptions import ToolError
from live_servers import LiveServer
from mcp import Client
from mcp.client.streamable_http import streamable_http_client
from mcp.shared.exceptions import MCPError
from PIL import Image

SMALL = {"prompt": "a red square", "width": 64, "height": 64}
KEYS = "ann:key-of-ann,bob:key-of-bob"
DATA_URL = f"data:image/png;base64,{base64.b64encode(file_of(disc(64, 64))).decode()}"
START = {
    "jsonrpc": "2.0",
    "id": 1,
    "method": "initialize",
    "params": {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "test", "version": "1"}},
}
HEADERS = {"Accept": "application/json, text/event-stream", "Content-Type": "application/json"}


@asynccontextmanager
async def client_of(server: LiveServer, mode: str = "auto", key: str = "") -> AsyncIterator[Client]:
    """The package's own client with one of our keys; `mode` is its era of the protocol."""
    sent = {"Authorization": f"Bearer {key}"} if key else {}
    async with (
        httpx2.AsyncClient(headers=sent, timeout=60) as http,
        Client(streamable_http_client(f"{server.url}/mcp", http_client=http), mode=mode) as client,
    ):
        yield client


async def states_of(server: LiveServer) -> set[str]:
    """The states of all jobs."""
    answer = await asyncio.to_thread(httpx.get, f"{server.url}/jobs")
    return {job["state"] for job in answer.json()["jobs"]}


def body_of(answer: Any) -> dict[str, Any]:
    """The JSON object of a tool's answer, which its text repeats."""
    assert json.loads(answer.content[0].text) == answer.structured_content
    return dict(answer.structured_content)


@pytest.mark.parametrize("mode", ["auto", "legacy"])
async def test_an_agent_lists_tools_and_draws(live_of: Callable[..., LiveServer], mode: str) -> None:
    """In both eras of the protocol: typed schemas, a URL with its receipt, and a small picture."""
    server = await asyncio.to_thread(live_of, api_keys=KEYS)
    async with client_of(server, mode, "key-of-ann") as client:
        tools = {tool.name: tool for tool in (await client.list_tools()).tools}
        assert set(tools) == set("draw edit restyle inpaint upscale list_models job_status cancel_job history".split())
        assert tools["draw"].input_schema["properties"]["width"]["maximum"] == 2048
        assert tools["draw"].input_schema["required"] == ["prompt"]
        drawn = await client.call_tool("draw", {**SMALL, "width": 1024, "height": 1024, "seed": 7})
        assert not drawn.is_error, drawn
        receipt = body_of(drawn)["receipt"]
        assert receipt["seed"] == 7
        picture = Image.open(io.BytesIO(base64.b64decode(drawn.content[1].data)))
        assert (picture.format, picture.size) == ("WEBP", (512, 512))
        whole = await asyncio.to_thread(httpx.get, receipt["path"])
        assert whole.headers["content-type"] == "image/webp"
        status = await client.call_tool("job_status", {"job_id": body_of(drawn)["id"]})
        assert body_of(status)["receipt"]["key"] == receipt["key"]
        models = body_of(await client.call_tool("list_models", {}))["models"]
        assert {"sdxl", "flux"} <= {model["name"] for model in models}
        found = body_of(await client.call_tool("history", {"query": "red", "limit": 5}))
        assert [one["key"] for one in found["pictures"]] == [receipt["key"]]


async def test_urls_of_this_server_and_data_urls_are_images(live_of: Callable[..., LiveServer]) -> None:
    """What a tool answered goes into the next one, although its address is a private one."""
    server = await asyncio.to_thread(live_of)
    async with client_of(server) as client:
        url = body_of(await client.call_tool("draw", SMALL))["receipt"]["path"]
        for name, more in (
            ("restyle", {"image": url, "strength": 0.5}),
            ("inpaint", {"image": url, "mask": DATA_URL}),
            ("inpaint", {"image": url, "extend_left": 64}),
        ):
            answer = await client.call_tool(name, {"prompt": "a blue square", **more})
            assert not answer.is_error, answer
        enlarged = await client.call_tool("upscale", {"image": url, "scale": 2})
        assert body_of(enlarged)["receipt"]["width"] == 128


async def test_an_edit_without_a_model_for_it_is_refused(live_of: Callable[..., LiveServer]) -> None:
    """Without a model that edits the answer says so; the images came through, of which it says nothing."""
    server = await asyncio.to_thread(live_of)
    async with client_of(server) as client:
        url = body_of(await client.call_tool("draw", SMALL))["receipt"]["path"]
        answer = await client.call_tool("edit", {"prompt": "both in one", "images": [url, DATA_URL]})
        assert answer.is_error
        assert "by instruction" in body_of(answer)["detail"]


@pytest.mark.parametrize("mode", ["auto", "legacy"])
async def test_a_long_job_reports_its_progress_and_is_cancelled(live_of: Callable[..., LiveServer], mode: str) -> None:
    """By `notifications/cancelled` in the earlier era, by closing the stream in the later one."""
    painter = FakeDenoiser(seconds_per_step=0.02)
    server = await asyncio.to_thread(live_of, painter)
    seen: list[tuple[float, float | None]] = []
    moved = asyncio.Event()

    async def note(progress: float, total: float | None, message: str | None) -> None:
        seen.append((progress, total))
        if progress > 2:
            moved.set()

    async with client_of(server, mode) as client:
        whole = await client.call_tool("draw", {**SMALL, "num_inference_steps": 12}, progress_callback=note)
        assert not whole.is_error
        assert seen == sorted(set(seen))
        assert seen[-1][1] == 12
        moved.clear()
        long = {**SMALL, "num_inference_steps": 150, "seed": 2}
        call = asyncio.create_task(client.call_tool("draw", long, progress_callback=note))
        await asyncio.wait_for(moved.wait(), 60)
        call.cancel()
        with pytest.raises((asyncio.CancelledError, MCPError)):
            await call
        async with asyncio.timeout(60):
            while "cancelled" not in await states_of(server):  # noqa: ASYNC110  # a test's poll
                await asyncio.sleep(0.05)
        assert len(painter.finished) == 1


async def test_a_job_that_is_not_waited_for_is_followed_and_cancelled_by_tools(
    live_of: Callable[..., LiveServer],
) -> None:
    """`wait: false` answers the id at once."""
    server = await asyncio.to_thread(live_of, FakeDenoiser(seconds_per_step=0.05), api_keys=KEYS)
    async with client_of(server, key="key-of-ann") as client, client_of(server, key="key-of-bob") as other:
        made = body_of(await client.call_tool("draw", {**SMALL, "num_inference_steps": 150, "wait": False}))
        assert made["state"] == "queued"
        asked = {"job_id": made["id"]}
        assert (await other.call_tool("cancel_job", asked)).is_error
        assert body_of(await client.call_tool("cancel_job", asked))["state"] == "cancelled"
        assert body_of(await client.call_tool("job_status", asked))["state"] == "cancelled"


async def test_bad_calls_name_every_parameter(live_of: Callable[..., LiveServer]) -> None:
    """As failed answers that an agent can read; a file of this machine is no image."""
    server = await asyncio.to_thread(live_of)
    async with client_of(server) as client:

        async def fields(name: str, arguments: dict[str, Any]) -> set[str]:
            answer = await client.call_tool(name, arguments)
            assert answer.is_error, answer
            return {fault["field"] for fault in body_of(answer)["errors"]}

        assert await fields("draw", {"width": 1, "save_path": "x", "webhook_url": "y"}) == {
            "save_path",
            "webhook_url",
            "prompt",
        }
        assert await fields("draw", {**SMALL, "width": 1, "num_inference_steps": 9999}) == {
            "width",
            "num_inference_steps",
        }
        for image in ("/etc/passwd", "file:///etc/passwd", "http://127.0.0.1:1/a.png", f"{server.url}/files/../data"):
            assert (await client.call_tool("restyle", {"prompt": "a", "image": image})).is_error
        assert await fields("job_status", {"job_id": 5}) == {"job_id"}
        assert (await client.call_tool("job_status", {"job_id": "../history"})).is_error
        with pytest.raises(MCPError):
            await client.call_tool("shell", {})


def test_strangers_are_refused_before_the_protocol_sees_them(live_of: Callable[..., LiveServer]) -> None:
    """No key, a wrong key, a foreign Origin, a foreign Host, another media type."""
    server = live_of(api_keys=KEYS)
    right = {**HEADERS, "Authorization": "Bearer key-of-ann"}
    for changed, status in (
        ({"Authorization": ""}, 401),
        ({"Authorization": "Bearer wrong"}, 401),
        ({"Origin": "https://evil.example"}, 403),
        ({"Host": "evil.example"}, 421),
        ({"Content-Type": "text/plain"}, 415),
    ):
        answer = httpx.post(f"{server.url}/mcp", json=None, content=json.dumps(START), headers={**right, **changed})
        assert answer.status_code == status
    assert httpx.post(f"{server.url}/mcp", json=START, headers=right).status_code == 200


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b'{"jsonrpc": "2.0", "id": 1, "method": "x", "params": ' + b'{"a":' * 3000 + b"1" + b"}" * 3001, 400),
        (b'{"params": [' + b"1," * 9000 + b"1]}", 400),
        (b'{"params": "' + b"a" * 9_000_000 + b'"}', 413),
        (b'{"id": ' + b"9" * 5000 + b"}", 422),
        (b"[" * 100_000, 400),
        (b"[]", 400),
        (b"\xff\xfe", 400),
        (b'{"jsonrpc": "2.0"}', 400),
    ],
    ids=["deep", "many", "large", "digits", "brackets", "batch", "no text", "no method"],
)
def test_hostile_messages_are_refused(live_of: Callable[..., LiveServer], body: bytes, status: int) -> None:
    """Before they are parsed without bounds; the next message is answered."""
    server = live_of()
    assert httpx.post(f"{server.url}/mcp", content=body, headers=HEADERS).status_code == status
    assert httpx.post(f"{server.url}/mcp", json=START, headers=HEADERS).status_code == 200


def test_sessions_are_bounded_and_belong_to_their_caller(live_of: Callable[..., LiveServer]) -> None:
    """A caller opens 16, another still one; an unknown session and another caller's are not found."""
    server = live_of(api_keys=KEYS)
    ann, bob = ({**HEADERS, "Authorization": f"Bearer key-of-{name}"} for name in ("ann", "bob"))
    with httpx.Client(base_url=server.url) as client:
        answers = [client.post("/mcp", json=START, headers=ann) for _ in range(17)]
        assert [answer.status_code for answer in answers] == [200] * 16 + [429]
        assert client.post("/mcp", json=START, headers=bob).status_code == 200
        session = answers[0].headers["mcp-session-id"]
        listing = {"jsonrpc": "2.0", "id": 2, "method": "tools/list"}
        version = {"Mcp-Protocol-Version": "2025-06-18"}

        def status(name: str, who: dict[str, str]) -> int:
            headers = {**who, **version, "Mcp-Session-Id": name}
            return client.post("/mcp", json=listing, headers=headers).status_code

        assert [status(session, ann), status(session, bob), status("none", ann)] == [200, 404, 404]
        assert client.delete("/mcp", headers={**ann, **version, "Mcp-Session-Id": session}).status_code == 200
        assert client.post("/mcp", json=START, headers=ann).status_code == 200


async def test_another_frameworks_client_draws_with_progress(live_of: Callable[..., LiveServer]) -> None:
    """FastMCP's, by the URL and a key alone: lists, draws, follows and shows errors."""
    server = await asyncio.to_thread(live_of, api_keys=KEYS)
    seen: list[float] = []

    async def note(progress: float, total: float | None, message: str | None) -> None:
        seen.append(progress)

    async with fastmcp.Client(f"{server.url}/mcp", auth="key-of-ann", progress_handler=note) as client:
        assert "draw" in {tool.name for tool in await client.list_tools()}
        drawn = await client.call_tool("draw", {**SMALL, "num_inference_steps": 5})
        assert drawn.structured_content["receipt"]["width"] == 64
        assert [block.type for block in drawn.content] == ["text", "image"]
        assert seen
        with pytest.raises(ToolError, match="width must be between"):
            await client.call_tool("draw", {**SMALL, "width": 1})
