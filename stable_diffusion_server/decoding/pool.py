"""A pool of decoding processes: bytes in, pixels or a named error out. Knows processes, and no picture format."""

from __future__ import annotations

import asyncio
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import structlog
from numpy.typing import NDArray

from stable_diffusion_server.decoding import child
from stable_diffusion_server.errors import InvalidInput, NotReady, ServerError, TooLarge, UnsupportedMedia
from stable_diffusion_server.picture_formats import ALWAYS, in_words

_log = structlog.get_logger(__name__)

# What a process needs before it sees a picture, and the most a picture takes per pixel: four copies of four bytes
# (decoded, turned, over white, as RGB), its bytes, and the coefficients of a progressive JPEG.
_BASE_MEMORY = 192 * 2**20
_MEMORY_PER_PIXEL = 28
# A process is replaced after so many pictures, lest what one of them left behind lives for ever.
_PICTURES_PER_PROCESS = 200


class Decoder:
    """Decodes pictures in at most `processes` children, started when they are needed. Lives on one event loop.

    `max_bytes` bounds a file, `max_pixels` an area, `max_side` a width or height in pixels, `seconds` the time of one
    picture; `formats` are the kinds of files taken, and `program` is what the children run. A child that dies, hangs
    or runs out of memory costs that picture alone: the caller gets `InvalidInput`.
    """

    def __init__(
        self,
        *,
        max_bytes: int,
        max_pixels: int,
        max_side: int,
        processes: int = 2,
        seconds: float = 10.0,
        formats: Sequence[str] = ALWAYS,
        program: str = child.__file__,
    ) -> None:
        self._max_bytes, self._max_pixels, self._max_side = max_bytes, max_pixels, max_side
        self._seconds, self._formats, self._program = seconds, formats, program
        self._places = asyncio.Semaphore(processes)
        self._idle: list[_Child] = []
        self._busy: set[_Child] = set()
        self._closed = False

    async def decode(self, data: bytes, field: str, *, transparency: bool = False) -> NDArray[np.uint8]:
        """The picture in a file of a kind that is taken, as uint8, height × width × 3; `field` is named in errors.

        With `transparency` it is grey, and white where the picture is transparent.

        Raises `TooLarge`, `UnsupportedMedia` for other files, `InvalidInput` for a broken or hostile one.
        """
        if len(data) > self._max_bytes:
            raise TooLarge(f"{field} is larger than {self._max_bytes} bytes.", field=field)
        async with self._places:
            while True:
                worker = self._idle.pop() if self._idle else await self._start()
                fresh = worker.pictures == 0
                try:
                    return await self._ask(worker, data, field, transparency)
                except _Died as death:
                    # A child that was idle may have been dead already; only a fresh one's end is the picture's doing.
                    if fresh:
                        _log.warning("a decoding process ended on a picture", field=field, bytes=len(data))
                        raise InvalidInput(f"{field} could not be decoded.", field=field) from death

    async def close(self) -> None:
        """End every child. Later calls of `decode` raise `NotReady`."""
        self._closed = True
        workers = [*self._idle, *self._busy]
        self._idle.clear()
        for worker in workers:
            await worker.end()

    async def _start(self) -> _Child:
        if self._closed:
            raise NotReady("The server is going down.", retry_after=5)
        memory = _BASE_MEMORY + 2 * self._max_bytes + _MEMORY_PER_PIXEL * self._max_pixels
        limits = (self._max_pixels, self._max_side, memory, int(self._seconds) + 1)
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-I", self._program, *map(str, limits), *self._formats,
            stdin=PIPE, stdout=PIPE, stderr=DEVNULL, env={}, cwd=Path(sys.executable).anchor,
        )  # fmt: skip
        return _Child(process)

    async def _ask(self, worker: _Child, data: bytes, field: str, transparency: bool) -> NDArray[np.uint8]:
        """One picture by one child, which goes back to the idle ones only when it answered in full."""
        self._busy.add(worker)
        answered = False
        try:
            async with asyncio.timeout(self._seconds):
                verdict, width, height, pixels = await worker.ask(data, transparency, self._fits)
            answered = True
        except TimeoutError as error:
            raise InvalidInput(f"{field} took too long to decode.", field=field) from error
        finally:
            self._busy.discard(worker)
            if answered and worker.pictures < _PICTURES_PER_PROCESS and not self._closed:
                self._idle.append(worker)
            else:
                await worker.end()
        if verdict != child.PIXELS:
            raise self._refusal(verdict, width, height, field)
        return np.frombuffer(pixels, np.uint8).reshape(height, width, 3)

    def _fits(self, width: int, height: int) -> bool:
        return width * height <= self._max_pixels and max(width, height) <= self._max_side

    def _refusal(self, verdict: bytes, width: int, height: int, field: str) -> ServerError:
        match verdict:
            case child.NOT_A_PICTURE:
                return UnsupportedMedia(f"{field} is not a {in_words(self._formats)} picture.", field=field)
            case child.TOO_LARGE:
                most = f"{self._max_pixels} pixels and {self._max_side} a side"
                return InvalidInput(f"{field} has {width} × {height} pixels; {most} are taken.", field=field)
            case child.NO_MEMORY:
                return InvalidInput(f"{field} takes too much memory to decode.", field=field)
            case _:
                return InvalidInput(f"{field} is a broken picture.", field=field)


class _Died(Exception):
    """The child went away in the middle of a picture."""


class _Child:
    """One decoding process, which answers one request at a time."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self.pictures = 0

    async def ask(
        self, data: bytes, transparency: bool, fits: Callable[[int, int], bool]
    ) -> tuple[bytes, int, int, bytes]:
        """Verdict, width, height, pixels. Raises `_Died`; after any other end of the call the child is of no use.

        A child that a picture has taken over may say anything: it is not believed a size that does not fit.
        """
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None  # noqa: S101, PT018  # both are pipes; tells the type checker
        try:
            stdin.write(child.REQUEST.pack(len(data), transparency))
            stdin.write(data)
            await stdin.drain()
            verdict, width, height = child.ANSWER.unpack(await stdout.readexactly(child.ANSWER.size))
            if verdict == child.PIXELS and not fits(width, height):
                raise _Died
            pixels = await stdout.readexactly(width * height * 3 if verdict == child.PIXELS else 0)
        except (OSError, asyncio.IncompleteReadError) as error:
            raise _Died from error
        self.pictures += 1
        return verdict, width, height, pixels

    async def end(self) -> None:
        """Kill the process and see it gone."""
        with suppress(ProcessLookupError):
            self._process.kill()
        await asyncio.shield(self._gone())

    async def _gone(self) -> None:
        await self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()
            with suppress(OSError):
                await self._process.stdin.wait_closed()
        if self._process.stdout is not None:
            with suppress(OSError):
                await self._process.stdout.read()
