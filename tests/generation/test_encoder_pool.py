"""Encoding large images never delays small ones."""

from __future__ import annotations

import asyncio
import threading

import pytest

from stable_diffusion_server.generation.output import EncoderPool

LARGE, SMALL = 2048 * 2048 * 3, 64 * 64 * 3


async def test_small_pictures_pass_large_ones() -> None:
    """Four large lossless images at once: one is encoded, the others wait, and small ones pass."""
    encoders, gate = EncoderPool(), threading.Event()
    at_work: list[int] = []

    def large(number: int) -> bytes:
        at_work.append(number)
        gate.wait(30)
        return b"large"

    waiting = [
        asyncio.create_task(encoders.encode(LARGE, lambda number=number: large(number), lossless=True))  # type: ignore[misc]  # a default binds it
        for number in range(4)
    ]
    for _ in range(10):
        assert await encoders.encode(SMALL, lambda: b"small", lossless=True) == b"small"
    assert at_work == [0]
    gate.set()
    assert await asyncio.gather(*waiting) == [b"large"] * 4
    encoders.close()


async def test_a_slot_is_free_only_when_the_work_has_ended() -> None:
    """A thread cannot be cancelled: the next large image starts when it has finished."""
    encoders, gate = EncoderPool(), threading.Event()
    first = asyncio.create_task(encoders.encode(LARGE, lambda: b"%d" % gate.wait(30), lossless=True))
    await asyncio.sleep(0.05)
    first.cancel()
    second = asyncio.create_task(encoders.encode(LARGE, lambda: b"second", lossless=True))
    await asyncio.sleep(0.05)
    assert not second.done()
    gate.set()
    assert await second == b"second"
    with pytest.raises(asyncio.CancelledError):
        await first
    encoders.close()
