"""Measures the cost of decoding in a separate process, compared with decoding in this one.

    PYTHONPATH=. python benchmarks/decoding.py [rounds]

The same function decodes the same file here and in a child process, in turn; the difference is the transfer of the
bytes and the pixels. Then it measures the start of a child, and what a crash, an endless loop and a decompression bomb
cost the next image.
"""

from __future__ import annotations

import asyncio
import io
import os
import platform
import signal
import statistics
import struct
import sys
import time
import zlib
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from loopback import say
from PIL import Image, ImageFilter

from stable_diffusion_server.errors import ServerError
from stable_diffusion_server.imaging import DEFAULT_FORMATS, DecoderPool
from stable_diffusion_server.imaging.sandbox import worker

ROUNDS = int(sys.argv[1]) if len(sys.argv) > 1 else 15
SIDES = (256, 512, 1024, 2048)
OPTIONS: dict[str, dict[str, object]] = {"PNG": {}, "JPEG": {"quality": 90}, "WEBP": {"quality": 90}}
LIMITS = {"max_bytes": 20 * 2**20, "max_pixels": 2**24, "max_side": 16_383}


def picture(side: int, file_format: str) -> bytes:
    """An encoded image with structure and a little noise, like a photograph."""
    noise = np.random.default_rng(side).integers(0, 256, (side, side, 3), dtype=np.uint8)
    target = io.BytesIO()
    Image.fromarray(noise).filter(ImageFilter.GaussianBlur(3)).save(target, file_format, **OPTIONS[file_format])
    return target.getvalue()


async def seconds_of(work: Callable[[], Awaitable[object]]) -> float:
    """Seconds that a call takes."""
    started = time.perf_counter()
    await work()
    return time.perf_counter() - started


async def here(data: bytes) -> None:
    """Decode in this process, as a server thread would."""
    verdict, width, height, pixels = worker.decode(
        data, list(DEFAULT_FORMATS), LIMITS["max_pixels"], LIMITS["max_side"]
    )
    if verdict != worker.PIXELS:
        raise SystemExit("not decoded")
    np.frombuffer(pixels, np.uint8).reshape(height, width, 3)


async def costs() -> None:
    """The table by format and size."""
    decoder = DecoderPool(**LIMITS, processes=1, seconds=60)
    say("| picture | file KB | here ms | in a child ms | costs ms | costs |\n| --- | --- | --- | --- | --- | --- |")
    for file_format in OPTIONS:
        for side in SIDES:
            data = picture(side, file_format)
            await decoder.decode(data, "image")  # starts the child process and warms up both
            pairs = [
                (await seconds_of(partial(here, data)), await seconds_of(partial(decoder.decode, data, "image")))
                for _ in range(ROUNDS)
            ]
            inside, outside = (1000 * statistics.median(column) for column in zip(*pairs, strict=True))
            more = 1000 * statistics.median(there - local for local, there in pairs)
            say(
                f"| {file_format} {side} × {side} | {len(data) // 1024} | {inside:.1f} | {outside:.1f} | {more:+.1f} "
                f"| {more / inside:+.0%} |"
            )
    await decoder.close()


async def first_picture() -> float:
    """Milliseconds until the first small image of a new pool, including the start of its child process."""
    decoder, data = DecoderPool(**LIMITS, processes=1, seconds=60), picture(256, "PNG")
    seconds = await seconds_of(lambda: decoder.decode(data, "image"))
    await decoder.close()
    return 1000 * seconds


async def mischief(what: str, data: bytes, program: str, seconds: float) -> None:
    """One line: the response to a bad image, and the delay until the next good one is decoded."""
    decoder = DecoderPool(**LIMITS, processes=1, seconds=seconds, program=program)
    started = time.perf_counter()
    try:
        await decoder.decode(data, "image_file")
        answer = "decoded"
    except ServerError as error:
        answer = f"{error.status} {error.detail}"
    bad = time.perf_counter() - started
    good = picture(256, "PNG")
    after = 1000 * await seconds_of(lambda: decoder.decode(good, "image"))
    await decoder.close()
    say(f"| {what} | {answer} | {1000 * bad:.0f} | {after:.0f} |")


def bomb() -> bytes:
    """A PNG of 50,000 × 50,000 black pixels in a few kilobytes: the header is complete, the data ends early."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(2**22), 9)) + chunk(b"IEND", b"")


def program_that(deed: str, folder: Path) -> str:
    """A child program that misbehaves on its first image and is the real one afterwards."""
    program = folder / f"{len(list(folder.iterdir()))}.py"
    mark = str(program.with_suffix(".done"))
    program.write_text(
        f"import os, pathlib, runpy, signal, sys\nmark = pathlib.Path({mark!r})\n"
        f"if not mark.exists():\n    sys.stdin.buffer.read(8)\n    mark.touch()\n    {deed}\n"
        f"runpy.run_path({worker.__file__!r}, run_name='__main__')\n"
    )
    return str(program)


async def main() -> None:
    """Run all measurements."""
    say(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {ROUNDS} rounds\n")
    await costs()
    starts = [await first_picture() for _ in range(max(3, ROUNDS // 3))]
    say(f"\nThe first picture of a child, its start included: {statistics.median(starts):.0f} ms.\n")
    say("| what is done to a child | answer | answered after ms | next picture ms |\n| --- | --- | --- | --- |")
    good = picture(256, "PNG")
    with TemporaryDirectory() as name:
        folder = Path(name)
        crash = f"os.kill(os.getpid(), {int(signal.SIGSEGV)})"
        await mischief("a crash (SIGSEGV)", good, program_that(crash, folder), 2)
        await mischief("an endless loop, bound of 2 s", good, program_that("while True: pass", folder), 2)
        await mischief("a PNG of 50,000 × 50,000", bomb(), worker.__file__, 2)


if __name__ == "__main__":
    asyncio.run(main())
