"""Silent hosts and DNS servers of one caller do not delay another caller's image fetch."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
from fakes import disc, file_of

from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.net.image_fetcher import FetchLimits, ImageFetcher
from stable_diffusion_server.net.url_policy import AllowedTarget
from stable_diffusion_server.net.webhook_client import WebhookClient

HOST = "127.0.0.1"
PICTURE = file_of(disc())


@pytest.fixture
async def port() -> AsyncIterator[int]:
    """A web server that serves an image at `/good`, and never answers elsewhere."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        if head.startswith(b"GET /good"):
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(PICTURE) + PICTURE)
        else:
            await reader.read()
        writer.close()

    server = await asyncio.start_server(serve, HOST, 0)
    yield server.sockets[0].getsockname()[1]
    server.close()


async def ended(tasks: Sequence[asyncio.Task[bytes]]) -> None:
    """Cancel tasks and wait for their ends."""
    for task in tasks:
        task.cancel()
    await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 30)


@pytest.mark.fault(116)
async def test_silent_hosts_of_one_caller_leave_places_for_others(port: int) -> None:
    """64 fetches of one caller wait in half of the slots; four of another finish while none of the first has ended."""
    fetcher = ImageFetcher(FetchLimits(1_000_000, total=60, first_byte=60), [AllowedTarget.parse(f"{HOST}:{port}")])
    silent = [
        asyncio.create_task(fetcher.fetch(f"http://{HOST}:{port}/silent-{n}", "image_url", share="key a"))
        for n in range(64)
    ]
    await asyncio.sleep(0.2)
    async with asyncio.timeout(30):
        for share in ("key b", "key c", "address d", "key b"):
            assert await fetcher.fetch(f"http://{HOST}:{port}/good", "image_url", share=share) == PICTURE
    assert not any(task.done() for task in silent)
    await ended(silent)
    assert await fetcher.fetch(f"http://{HOST}:{port}/good", "image_url", share="key a") == PICTURE
    fetcher.close()


@pytest.mark.fault(116)
async def test_silent_name_servers_of_one_caller_leave_threads_for_others(port: int) -> None:
    """A DNS lookup continues in its thread after its fetch was cancelled.

    Its slot stays taken, and others get theirs.
    """
    answer, threads, asked = threading.Event(), ThreadPoolExecutor(16), list[str]()

    def look_up(host: str) -> list[str]:
        asked.append(host)
        if host.startswith("silent"):
            answer.wait(60)
        return [HOST]

    async def resolve(host: str, port: int) -> list[str]:
        return await asyncio.get_running_loop().run_in_executor(threads, look_up, host)

    fetcher = ImageFetcher(FetchLimits(1_000_000, total=60), [AllowedTarget.parse(f"good.test:{port}")], resolve)
    silent = [
        asyncio.create_task(fetcher.fetch(f"http://silent-{n}.test:{port}/", "image_url", share="key a"))
        for n in range(64)
    ]
    while len(asked) < 8:  # noqa: ASYNC110  # a test's wait
        await asyncio.sleep(0.01)
    await ended(silent)
    again = asyncio.create_task(fetcher.fetch(f"http://silent.test:{port}/", "image_url", share="key a"))
    assert await fetcher.fetch(f"http://good.test:{port}/good", "image_url", share="key b") == PICTURE
    assert len([host for host in asked if host.startswith("silent")]) == 8
    await ended([again])
    answer.set()
    threads.shutdown()
    fetcher.close()


@pytest.mark.fault(116)
async def test_the_address_of_a_webhook_is_looked_up_within_its_time() -> None:
    """A silent DNS server costs its caller a 4xx, and does not block a request forever."""

    async def resolve(host: str, port: int) -> list[str]:
        await asyncio.sleep(3600)
        return []

    poster = WebhookClient(0.2, resolve=resolve)
    async with asyncio.timeout(20):
        with pytest.raises(InvalidInput, match=r"was not found in 0\.2 seconds"):
            await poster.check("http://silent.test/hook", "key a")
    poster.close()
