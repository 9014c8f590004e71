"""Clients that disconnect during decoding, and decoder processes that hang or crash: every slot is free again."""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import file_of
from test_decoder_pool import children

from stable_diffusion_server.errors import InvalidInput, NotReady
from stable_diffusion_server.imaging.sandbox.pool import DecoderPool

pytestmark = pytest.mark.slow

HANG_UPS = 1000
SIDE = 600
LIMITS: dict[str, Any] = {"max_bytes": 4_000_000, "max_pixels": 20_000_000, "max_side": 5000}

# A decoder process whose behaviour the first byte of its input selects, at any point of the protocol.
SCRIPTED = f"""
import os, signal, struct, sys
source, target = sys.stdin.buffer, sys.stdout.buffer
REQUEST, ANSWER, SIZE = struct.Struct(">Q?"), struct.Struct(">cII"), {SIDE} * {SIDE} * 3
while len(head := source.read(REQUEST.size)) == REQUEST.size:
    length, _ = REQUEST.unpack(head)
    deed = source.read(1)
    if deed == b"w":
        signal.pause()  # never reads the rest: the server is still writing
    if deed == b"x":
        os._exit(3)
    source.read(length - 1)
    if deed == b"s":
        signal.pause()  # says nothing at all
    if deed == b"k":
        os.kill(os.getpid(), signal.SIGKILL)
    target.write(ANSWER.pack(b"P", {SIDE}, {SIDE}))
    target.flush()
    if deed == b"h":
        signal.pause()  # after the header
    target.write(bytes(SIZE // 2))
    target.flush()
    if deed == b"p":
        signal.pause()  # amid the pixels
    if deed == b"c":
        os._exit(1)
    target.write(bytes(SIZE - SIZE // 2))
    target.flush()
"""
DEEDS = b"wxskhpcnnn"


@pytest.fixture
def scripted(tmp_path: Path) -> str:
    """The path of such a program."""
    program = tmp_path / "scripted.py"
    program.write_text(SCRIPTED)
    return str(program)


def zombies() -> set[int]:
    """Child processes that have ended and were not reaped."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, ValueError):
            state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            if state == "Z" and int(parent) == os.getpid():
                found.add(int(entry.name))
    return found


def open_files() -> int:
    """Number of this process's open file descriptors."""
    return len(os.listdir("/proc/self/fd"))


async def settled(condition: Callable[[], bool]) -> bool:
    """Whether a condition becomes true within ten seconds; the event loop keeps running."""
    for _ in range(500):
        if condition():
            return True
        await asyncio.sleep(0.02)
    return False


async def hang_up(decoder: DecoderPool, deed: bytes, size: int, after: float | None) -> str:
    """Request a decode and cancel after so many seconds (`None`: never); return the outcome."""
    decoding = asyncio.create_task(decoder.decode(deed.ljust(size, b"."), "image_file"))
    if after is not None:
        await asyncio.sleep(after)
        decoding.cancel()
    try:
        await decoding
    except asyncio.CancelledError:
        return "left"
    except InvalidInput as error:
        return "late" if "too long" in error.detail else "crashed"
    return "decoded"


@pytest.mark.fault(110)
async def test_after_a_thousand_hang_ups_at_random_moments_every_place_is_free(scripted: str) -> None:
    """Cancelled while writing, before the response, amid the pixels; timed out.

    Crashed: no slot, process or file is lost.
    """
    chance = random.Random(21)  # noqa: S311  # reproducible timing
    decoder = DecoderPool(**LIMITS, processes=4, seconds=2, program=scripted)
    before, became, gate = open_files(), Counter[str](), asyncio.Semaphore(12)

    async def one(number: int) -> None:
        async with gate:
            deed = bytes([chance.choice(DEEDS)])
            size = 700_000 if deed == b"w" else chance.choice((2, 1000, 300_000))
            after = None if number % 25 == 0 else chance.uniform(0, 0.06)
            became[await asyncio.wait_for(hang_up(decoder, deed, size, after), 60)] += 1

    await asyncio.gather(*map(one, range(HANG_UPS)))
    assert became.total() == HANG_UPS
    assert became["left"] > HANG_UPS // 2
    assert became["late"] + became["crashed"] > 0
    async with asyncio.timeout(120):  # on a busy machine one may take too long; none waits forever
        whole = 0
        while whole < 8:
            whole += (await asyncio.gather(*(hang_up(decoder, b"n", 2, None) for _ in range(4)))).count("decoded")
    assert await settled(lambda: len(children(scripted)) <= 4 and not zombies())
    await decoder.close()
    assert await settled(lambda: not children(scripted) and not zombies())
    assert open_files() <= before + 2


@pytest.mark.fault(110)
@pytest.mark.parametrize("seconds", [0.15, 20.0], ids=["timed out", "left"])
async def test_the_real_decoder_loses_no_place_to_large_pictures(seconds: float) -> None:
    """An image of 4000 × 4000 in 54 KB, cancelled at any moment, forty times."""
    chance = random.Random(21)  # noqa: S311  # reproducible timing
    picture = file_of(np.zeros((4000, 4000, 3), np.uint8))
    decoder = DecoderPool(**LIMITS, processes=2, seconds=seconds)
    small = file_of(np.zeros((8, 8, 3), np.uint8))
    for _ in range(40):
        decoding = asyncio.create_task(decoder.decode(picture, "image_file"))
        await asyncio.wait([decoding], timeout=chance.uniform(0.05, 0.7))
        decoding.cancel()
        _, stuck = await asyncio.wait([decoding], timeout=10)
        assert not stuck, "a decode that was given up never ends"
        if not decoding.cancelled():
            decoding.exception()
    await decoder.close()
    decoder = DecoderPool(**LIMITS, processes=2, seconds=20)
    async with asyncio.timeout(30):
        assert (await decoder.decode(small, "image_file")).shape == (8, 8, 3)
    await decoder.close()
    assert await settled(lambda: not children() and not zombies())


@pytest.mark.fault(110)
async def test_a_caller_who_leaves_while_waiting_for_a_place_leaves_none_taken(scripted: str) -> None:
    """A hundred wait behind a hanging process, and all are cancelled: the next image is decoded."""
    decoder = DecoderPool(**LIMITS, processes=1, seconds=20, program=scripted)
    waiting = [asyncio.create_task(decoder.decode(b"s", "image_file")) for _ in range(100)]
    await asyncio.sleep(0.2)
    for decoding in waiting:
        decoding.cancel()
    await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), 20)
    async with asyncio.timeout(20):
        assert (await decoder.decode(b"n.", "image_file")).shape == (SIDE, SIDE, 3)
    await decoder.close()


@pytest.mark.fault(111)
async def test_slow_pictures_of_one_caller_leave_places_for_others(scripted: str) -> None:
    """Of three slots one caller gets two, however much it requests; two others are served meanwhile."""
    decoder = DecoderPool(**LIMITS, processes=3, seconds=60, program=scripted)
    slow = [asyncio.create_task(decoder.decode(b"s", "image_file", share="key a")) for _ in range(64)]
    await asyncio.sleep(0.2)
    async with asyncio.timeout(30):
        for share in ("key b", "key c", "key b"):
            assert (await decoder.decode(b"n.", "image_file", share=share)).shape == (SIDE, SIDE, 3)
    assert not any(decoding.done() for decoding in slow)
    for decoding in slow:
        decoding.cancel()
    await asyncio.wait_for(asyncio.gather(*slow, return_exceptions=True), 30)
    await decoder.close()


@pytest.mark.fault(112)
async def test_a_pool_that_makes_no_progress_says_so(scripted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a deadline ever failed, the pool would report a stall; an idle or busy pool does not."""

    class Forever:
        """A deadline that never comes."""

        def __init__(self, seconds: float) -> None:
            pass

        async def __aenter__(self) -> None:
            pass

        async def __aexit__(self, *error: object) -> None:
            pass

    decoder = DecoderPool(**LIMITS, processes=1, seconds=20, program=scripted)
    assert decoder.health() is None
    await decoder.decode(b"n.", "image_file")
    monkeypatch.setattr("stable_diffusion_server.imaging.sandbox.pool.asyncio.timeout", Forever)
    monkeypatch.setattr(decoder._monitor, "_bound", 0.3)
    hanging: asyncio.Task[Any] = asyncio.create_task(decoder.decode(b"s", "image_file"))
    await asyncio.sleep(0.1)
    assert decoder.health() is None
    await asyncio.sleep(0.4)
    assert "makes no progress" in str(decoder.health())
    monkeypatch.undo()
    hanging.cancel()
    with suppress(asyncio.CancelledError):
        await hanging
    assert decoder.health() is None
    await decoder.close()


async def test_a_machine_without_memory_for_a_process_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """If no process can start, the caller gets a retryable error, and the slot is free."""

    def refuse(*given: object, **named: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    decoder = DecoderPool(**LIMITS, processes=1)
    with monkeypatch.context() as full:
        full.setattr("stable_diffusion_server.imaging.sandbox.pool.subprocess.Popen", refuse)
        for _ in range(3):
            with pytest.raises(NotReady):
                await decoder.decode(b"n.", "image_file")
    small = file_of(np.zeros((8, 8, 3), np.uint8))
    assert (await decoder.decode(small, "image_file")).shape == (8, 8, 3)
    await decoder.close()
