"""A pool of decoding processes: bytes in, pixels or a named error out. Knows processes, and no picture format."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import structlog
from numpy.typing import NDArray

from stable_diffusion_server.concurrency import FairLimiter, ProgressMonitor
from stable_diffusion_server.errors import InvalidInput, NotReady, ServerError, TooLarge, UnsupportedMedia
from stable_diffusion_server.imaging.formats import DEFAULT_FORMATS, describe_formats
from stable_diffusion_server.imaging.sandbox import worker as child

_log = structlog.get_logger(__name__)

# What a process needs before it sees a picture, and the most a picture takes per pixel: four copies of four bytes
# (decoded, turned, over white, as RGB), its bytes, and the coefficients of a progressive JPEG.
_BASE_MEMORY = 192 * 2**20
_MEMORY_PER_PIXEL = 28
# A process is replaced after so many pictures, lest what one of them left behind lives for ever.
_PICTURES_PER_PROCESS = 200
# A killed process is gone within milliseconds, unless the kernel holds it (a core dump, a file system that hangs).
_SECONDS_TO_DIE = 5.0
_LOOK_EVERY = 0.005
_MOMENT = 1.0
_SLACK = 5.0


class DecoderPool:
    """Decodes pictures in at most `processes` children, started when they are needed. Lives on one event loop.

    The places are shared out by caller: one caller alone gets about half of them. `max_bytes` bounds a file,
    `max_pixels` an area, `max_side` a width or height in pixels, `seconds` the time of one picture; `formats` are the
    kinds of files taken, and `program` is what the children run. A child that dies, hangs or runs out of memory costs
    that picture alone: the caller gets `InvalidInput`, and the place is free at once.
    """

    def __init__(
        self,
        *,
        max_bytes: int,
        max_pixels: int,
        max_side: int,
        processes: int = 3,
        seconds: float = 10.0,
        formats: Sequence[str] = DEFAULT_FORMATS,
        program: str = child.__file__,
    ) -> None:
        self._max_bytes, self._max_pixels, self._max_side = max_bytes, max_pixels, max_side
        self._seconds, self._formats, self._program = seconds, formats, program
        self._processes = processes
        self._places = FairLimiter(processes)
        self._monitor = ProgressMonitor(2 * seconds + _SLACK)
        self._idle: list[_Child] = []
        self._busy: set[_Child] = set()
        self._dying: set[asyncio.Task[bool]] = set()
        self._closed = False

    async def decode(
        self, data: bytes, field: str, *, transparency: bool = False, share: str = ""
    ) -> NDArray[np.uint8]:
        """The picture in a file of a kind that is taken, as uint8, height × width × 3; `field` is named in errors.

        With `transparency` it is grey, and white where the picture is transparent. `share` tells callers apart.

        Raises `TooLarge`, `UnsupportedMedia` for other files, `InvalidInput` for a broken or hostile one, `NotReady`
        where no process can be started.
        """
        if len(data) > self._max_bytes:
            raise TooLarge(f"{field} is larger than {self._max_bytes} bytes.", field=field)
        with self._monitor.track():
            try:
                async with self._places.hold(share):
                    return await self._decode(data, field, transparency)
            except BaseException:
                if self._dying:  # the place is free already; the process is gone in a moment
                    await asyncio.wait(self._dying, timeout=_MOMENT)
                raise

    def health(self) -> str | None:
        """Why no picture is decoded although some are waited for, in a sentence; `None` while all is well."""
        if silent := self._monitor.stalled_seconds():
            count = self._monitor.pending
            return f"The decoder of pictures makes no progress: {count} wait, and none ended in {silent:.0f} seconds."
        return None

    async def close(self) -> None:
        """End every child, and wait a moment until they are gone. Later calls of `decode` raise `NotReady`."""
        self._closed = True
        for worker in (*self._idle, *self._busy):
            self._end(worker)
        self._idle.clear()
        if self._dying:
            await asyncio.wait(self._dying, timeout=_SECONDS_TO_DIE)

    async def _decode(self, data: bytes, field: str, transparency: bool) -> NDArray[np.uint8]:
        """One picture by one child, or by another where the first one had died while it was idle."""
        try:
            async with asyncio.timeout(self._seconds):
                while True:
                    worker = self._idle.pop() if self._idle else await self._start()
                    fresh = worker.pictures == 0
                    try:
                        verdict, width, height, pixels = await self._ask(worker, data, transparency)
                        break
                    except _Died as death:
                        # A child that was idle may have been dead already; only a fresh one's end is the picture's.
                        if fresh:
                            _log.warning("a decoding process ended on a picture", field=field, bytes=len(data))
                            raise InvalidInput(f"{field} could not be decoded.", field=field) from death
        except TimeoutError as error:
            raise InvalidInput(f"{field} took too long to decode.", field=field) from error
        if verdict != child.PIXELS:
            raise self._refusal(verdict, width, height, field)
        return pixels.reshape(height, width, 3)

    async def _ask(self, worker: _Child, data: bytes, transparency: bool) -> tuple[bytes, int, int, NDArray[np.uint8]]:
        """What a child answers, which goes back to the idle ones only when it answered in full."""
        self._busy.add(worker)
        answered = False
        try:
            answer = await worker.ask(data, transparency, self._fits)
            answered = True
            return answer
        finally:
            # Nothing is waited for here: a caller who leaves must leave the place too.
            self._busy.discard(worker)
            if answered and worker.pictures < _PICTURES_PER_PROCESS and not self._closed:
                self._idle.append(worker)
            else:
                self._end(worker)

    async def _start(self) -> _Child:
        """A new child. Raises `NotReady`. Those that are ending are waited for, so that memory stays bounded."""
        while len(self._dying) >= self._processes and not self._closed:
            await asyncio.wait(self._dying, return_when=asyncio.FIRST_COMPLETED)
        if self._closed:
            raise NotReady("The server is going down.", retry_after=5)
        memory = _BASE_MEMORY + 2 * self._max_bytes + _MEMORY_PER_PIXEL * self._max_pixels
        limits = (self._max_pixels, self._max_side, memory, int(self._seconds) + 1)
        try:
            return _Child([sys.executable, "-I", self._program, *map(str, limits), *self._formats])
        except OSError as error:
            _log.error("no decoding process can be started", reason=str(error))
            raise NotReady("No process can be started to decode pictures.", retry_after=5) from error

    def _end(self, worker: _Child) -> None:
        """Kill a child now, and see to it that it is reaped."""
        worker.kill()
        task = asyncio.get_running_loop().create_task(self._reap(worker))
        self._dying.add(task)
        task.add_done_callback(self._dying.discard)

    async def _reap(self, worker: _Child) -> bool:
        """Whether a killed child is gone, after its time to die at the latest."""
        if not (gone := await worker.gone(_SECONDS_TO_DIE)):
            _log.error("a decoding process does not end although it was killed", pid=worker.pid)
        return gone

    def _fits(self, width: int, height: int) -> bool:
        return width * height <= self._max_pixels and max(width, height) <= self._max_side

    def _refusal(self, verdict: bytes, width: int, height: int, field: str) -> ServerError:
        match verdict:
            case child.NOT_A_PICTURE:
                return UnsupportedMedia(f"{field} is not a {describe_formats(self._formats)} picture.", field=field)
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
    """One decoding process, which answers one request at a time over a socket that is its stdin and stdout.

    A socket and no pipes of asyncio's: those end only when they were read to their end, which may never come. Raises
    `OSError` where no process can be started.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self._socket, theirs = socket.socketpair()
        with theirs:
            try:
                self._process: subprocess.Popen[bytes] = subprocess.Popen(  # noqa: S603  # our own program
                    command,
                    stdin=theirs.fileno(),
                    stdout=theirs.fileno(),
                    stderr=subprocess.DEVNULL,
                    env=dict[str, str](),
                    cwd=Path(sys.executable).anchor,
                )
            except BaseException:
                self._socket.close()
                raise
        self._socket.setblocking(False)
        self.pictures = 0

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._process.pid

    async def ask(
        self, data: bytes, transparency: bool, fits: Callable[[int, int], bool]
    ) -> tuple[bytes, int, int, NDArray[np.uint8]]:
        """Verdict, width, height, pixels. Raises `_Died`; after any other end of the call the child is of no use.

        A child that a picture has taken over may say anything: it is not believed a size that does not fit.
        """
        loop = asyncio.get_running_loop()
        try:
            await loop.sock_sendall(self._socket, child.REQUEST.pack(len(data), transparency))
            await loop.sock_sendall(self._socket, data)
            verdict, width, height = child.ANSWER.unpack((await self._read(child.ANSWER.size)).data)
            if verdict == child.PIXELS and not fits(width, height):
                raise _Died
            pixels = await self._read(width * height * 3 if verdict == child.PIXELS else 0)
        except OSError as error:
            raise _Died from error
        self.pictures += 1
        return verdict, width, height, pixels

    def kill(self) -> None:
        """End the process, and let go of it: nothing it holds is waited for."""
        self._process.kill()
        self._socket.close()

    async def gone(self, seconds: float) -> bool:
        """Whether a killed process has ended and is reaped, within so many seconds."""
        loop = asyncio.get_running_loop()
        latest = loop.time() + seconds
        while self._process.poll() is None:
            if loop.time() > latest:
                return False
            await asyncio.sleep(_LOOK_EVERY)
        return True

    async def _read(self, size: int) -> NDArray[np.uint8]:
        """So many bytes. Raises `_Died` when the process ended before."""
        loop, data, read = asyncio.get_running_loop(), np.empty(size, np.uint8), 0
        while read < size:
            count = await loop.sock_recv_into(self._socket, data[read:].data)
            if count == 0:
                raise _Died
            read += count
            await asyncio.sleep(0)  # data that is there already is read without the loop's other work having a turn
        return data
