"""Draws by the Model Context Protocol with its own client: `SERVER=http://127.0.0.1:8000 KEY=… python with_mcp.py`."""

from __future__ import annotations

import asyncio
import base64
from importlib.metadata import version
from typing import Any

import httpx2
from cells import (
    KEY,
    SERVER,
    WORDS,
    ClientReport,
    cancelled_count,
    check,
    circle,
    hole,
    outside_is_exact,
    picture_of,
    png,
    running_count,
)
from mcp import Client
from mcp.client.streamable_http import streamable_http_client
from mcp.shared.exceptions import MCPError

SMALL = {"prompt": WORDS, "width": 256, "height": 256}


def data_url(data: bytes) -> str:
    """An image file as a data URL."""
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


async def made(client: Client, tool: str, arguments: dict[str, Any], **more: Any) -> str:
    """The URL that a drawing tool answers; its own picture is small and can be read."""
    answer = await client.call_tool(tool, arguments, **more)
    check(not answer.is_error, answer.content[0].text)
    check(max(picture_of(answer.content[1].data).size) <= 512, "the answer has a small picture")
    return str(answer.structured_content["receipt"]["path"])


async def draw(report: ClientReport, client: Client) -> None:
    """The columns connect, list, draw and edit."""
    with report.cell("connect"):
        check(client.server_info is not None, "the server says who it is")
    with report.cell("list"):
        check("draw" in {tool.name for tool in (await client.list_tools()).tools}, "the tools are listed")
        models = (await client.call_tool("list_models", {})).structured_content["models"]
        check({"sdxl", "flux"} <= {model["name"] for model in models}, "the models are listed")
    for model in ("sdxl", "flux"):
        with report.cell("draw"):
            url = await made(client, "draw", {**SMALL, "model": model, "seed": 7})
            check(picture_of(url).size == (256, 256), f"{model} answers the URL of an image")
    with report.cell("edit"):
        url = await made(client, "draw", SMALL)
        await made(client, "restyle", {"prompt": WORDS, "image": url, "strength": 0.5})
        check(
            picture_of(await made(client, "upscale", {"image": url, "scale": 2})).size == (512, 512), "it is enlarged"
        )
    with report.cell("edit"):
        white = hole().getchannel("A").point(lambda alpha: 0 if alpha else 255)
        images = {"image": data_url(png(circle())), "mask": data_url(png(white))}
        edited = await made(client, "inpaint", {"prompt": WORDS, **images, "format": "png"})
        check(outside_is_exact(picture_of(edited)), "the rest stays as it was")


async def control(report: ClientReport, client: Client) -> None:
    """The columns progress, cancel and errors."""
    seen: list[float] = []
    running = asyncio.Event()

    async def note(progress: float, total: float | None, message: str | None) -> None:
        seen.append(progress)
        running.set()

    with report.cell("progress"):
        await made(client, "draw", {**SMALL, "num_inference_steps": 8, "seed": 1}, progress_callback=note)
        check(len(seen) > 1, "each step is reported")
    with report.cell("cancel"):
        before = cancelled_count()
        running.clear()
        long = {"prompt": WORDS, "num_inference_steps": 100}
        call = asyncio.create_task(client.call_tool("draw", long, progress_callback=note))
        await running.wait()
        check(running_count() > 0, "the request is on the device")
        call.cancel()
        for _ in range(300):
            if cancelled_count() > before:
                break
            await asyncio.sleep(0.1)
        check(cancelled_count() > before, "the engine cancels the request")
    with report.cell("errors"):
        refused = await client.call_tool("draw", {**SMALL, "width": 9})
        check(refused.is_error and "width" in refused.content[0].text, "a refused value is named")
        try:
            await client.call_tool("nonesuch", {})
        except MCPError as error:
            check("nonesuch" in str(error), "an unknown tool is named")
        else:
            check(False, "an unknown tool is refused")


async def main() -> None:
    """All columns."""
    report = ClientReport(f"mcp (Python) {version('mcp')}")
    async with (
        httpx2.AsyncClient(headers={"Authorization": f"Bearer {KEY}"}, timeout=90) as http,
        Client(streamable_http_client(f"{SERVER}/mcp", http_client=http)) as client,
    ):
        await draw(report, client)
        await control(report, client)


if __name__ == "__main__":
    asyncio.run(main())
