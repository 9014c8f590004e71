"""A pool of sandboxed processes that decode untrusted image files."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import structlog
from numpy.typing import NDArray

from stable_diffusion_server.concurrency import FairLimiter, ProgressMonitor
from stable_diffusion_server.errors import InvalidInput, NotReady, ServerError, TooLarge, UnsupportedMedia
from stable_diffusion_server.imaging.formats import DEFAULT_FORMATS, describe_formats
from stable_diffusion_server.imaging.sandbox import worker as worker_program

_log = structlog.get_logger(__name__)

# Address space of an idle process, and per pixel: four copies of four bytes (decoded, rotated, on white, as RGB), the
# file itself, and the coefficients of a progressive JPEG.
_BASE_MEMORY = 192 * 2**20
_MEMORY_PER_PIXEL = 28
# Processes are replaced after this many images, so that memory leaks and malicious state do not accumulate.
_IMAGES_PER_PROCESS = 200
# A killed process ends within milliseconds, unless the kernel blocks it (core dump, hanging file system).
_KILL_SECONDS = 5.0
_POLL_INTERVAL = 0.005
# How long a failed `decode` waits for killed processes.
_REAP_SECONDS = 1.0
# Added to twice the time limit of an image before the pool counts as stalled.
_STALL_MARGIN = 5.0
# Signed files are larger by their ingredients' credentials, of 1 MB each, which are in the request too.
_MAX_GROWTH = 2**20


class DecoderPool:
    """Decodes images in child processes that are started on demand. Use it on one event loop.

    Callers share the processes fairly: a single caller gets about half of them. If a process crashes, hangs or runs out
    of memory, only its image fails, with `InvalidInput`, and another process can start at once.

    Args:
        max_bytes: Size of a file.
        max_pixels: Area of an image.
        max_side: Width or height of an image in pixels.
        processes: Number of processes that decode at the same time.
        seconds: Time limit for one image.
        formats: Accepted formats, by Pillow's names.
        program: Path of the program that the processes run.
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
        program: str = worker_program.__file__,
    ) -> None:
        self.max_bytes, self._max_pixels, self._max_side = max_bytes, max_pixels, max_side
        self._seconds, self._formats, self._program = seconds, formats, program
        self._processes = processes
        self._limiter = FairLimiter(processes)
        self._monitor = ProgressMonitor(2 * seconds + _STALL_MARGIN)
        self._idle: list[_WorkerProcess] = []
        self._busy: set[_WorkerProcess] = set()
        self._dying: set[asyncio.Task[bool]] = set()
        self._closed = False

    async def decode(
        self, data: bytes, field: str, *, transparency: bool = False, share: str = ""
    ) -> NDArray[np.uint8]:
        """Decode an image file to RGB pixels: uint8, height × width × 3.

        With `transparency` the pixels show transparency instead of colour: white where the image is transparent.
        `field` is named in errors; `share` identifies the caller.

        Raises `TooLarge`, `UnsupportedMedia` for other formats, `InvalidInput` for a broken or malicious file,
        `NotReady` if no process can be started.
        """
        if len(data) > self.max_bytes:
            raise TooLarge(f"{field} is larger than {self.max_bytes} bytes.", field=field)
        kind = worker_program.SHOW_TRANSPARENCY if transparency else worker_program.DECODE
        width, height, pixels = await self._run(kind, data, field, share)
        return pixels.reshape(height, width, 3)

    async def handle_credentials(
        self,
        head: Mapping[str, object],
        files: Sequence[bytes],
        field: str,
        *,
        sign: Callable[[bytes], bytes] | None = None,
        share: str = "",
    ) -> bytes:
        """Sign the first of the files, the others being its ingredients, or without `sign` read its credentials.

        `head` and the answer are those of `credentials.sign` and `credentials.inspect`. Raises as `decode` does.
        """
        text = json.dumps({**head, "sizes": [len(file) for file in files]}).encode()
        data = b"".join((worker_program.SIGNATURE.pack(len(text)), text, *files))
        kind = worker_program.READ_CREDENTIALS if sign is None else worker_program.SIGN_CREDENTIALS
        return (await self._run(kind, data, field, share, sign))[2].tobytes()

    async def _run(
        self, kind: int, data: bytes, field: str, share: str, sign: Callable[[bytes], bytes] | None = None
    ) -> tuple[int, int, NDArray[np.uint8]]:
        with self._monitor.track():
            try:
                async with self._limiter.hold(share):
                    return await self._decode(kind, data, field, sign)
            except BaseException:
                if self._dying:  # the limiter is released already; give the killed process time to end
                    await asyncio.wait(self._dying, timeout=_REAP_SECONDS)
                raise

    def health(self) -> str | None:
        """A sentence that says why the pool makes no progress, or `None` if it does."""
        if stalled := self._monitor.stalled_seconds():
            count = self._monitor.pending
            return f"The decoder of pictures makes no progress: {count} wait, and none ended in {stalled:.0f} seconds."
        return None

    async def close(self) -> None:
        """Kill all processes and wait up to 5 seconds for them. Later calls of `decode` raise `NotReady`."""
        self._closed = True
        for worker in (*self._idle, *self._busy):
            self._kill(worker)
        self._idle.clear()
        if self._dying:
            await asyncio.wait(self._dying, timeout=_KILL_SECONDS)

    async def _decode(
        self, kind: int, data: bytes, field: str, sign: Callable[[bytes], bytes] | None
    ) -> tuple[int, int, NDArray[np.uint8]]:
        """Use one process, or a second one if the first had died while it was idle."""
        try:
            async with asyncio.timeout(self._seconds):
                while True:
                    worker = self._idle.pop() if self._idle else await self._start()
                    is_new = worker.images == 0
                    try:
                        verdict, width, height, pixels = await self._ask(worker, kind, data, sign)
                        break
                    except _Died as death:
                        # An idle process may have died before; only for a new one the image must be the cause.
                        if is_new:
                            _log.warning("a decoding process ended on a picture", field=field, bytes=len(data))
                            raise InvalidInput(f"{field} could not be decoded.", field=field) from death
        except TimeoutError as error:
            raise InvalidInput(f"{field} took too long to decode.", field=field) from error
        expected = worker_program.PIXELS if kind < worker_program.SIGN_CREDENTIALS else worker_program.RESULT
        if verdict != expected:
            raise self._refusal(verdict, width, height, field)
        return width, height, pixels

    async def _ask(
        self, worker: _WorkerProcess, kind: int, data: bytes, sign: Callable[[bytes], bytes] | None
    ) -> tuple[bytes, int, int, NDArray[np.uint8]]:
        """The answer of a process, which becomes idle again only if it answered completely."""
        self._busy.add(worker)
        answered = False
        try:
            answer = await worker.ask(kind, data, self._fits, sign)
            answered = True
            return answer
        finally:
            # No await here: a cancelled caller must release its process too.
            self._busy.discard(worker)
            if answered and worker.images < _IMAGES_PER_PROCESS and not self._closed:
                self._idle.append(worker)
            else:
                self._kill(worker)

    async def _start(self) -> _WorkerProcess:
        """Start a process; wait for killed ones first, to bound memory. Raises `NotReady`."""
        while len(self._dying) >= self._processes and not self._closed:
            await asyncio.wait(self._dying, return_when=asyncio.FIRST_COMPLETED)
        if self._closed:
            raise NotReady("The server is going down.", retry_after=5)
        memory = _BASE_MEMORY + 2 * self.max_bytes + _MEMORY_PER_PIXEL * self._max_pixels
        limits = (self._max_pixels, self._max_side, memory, int(self._seconds) + 1)
        try:
            return _WorkerProcess([sys.executable, "-I", self._program, *map(str, limits), *self._formats])
        except OSError as error:
            _log.error("no decoding process can be started", reason=str(error))
            raise NotReady("No process can be started to decode pictures.", retry_after=5) from error

    def _kill(self, worker: _WorkerProcess) -> None:
        """Kill a process now, and reap it in the background."""
        worker.kill()
        task = asyncio.get_running_loop().create_task(self._reap(worker))
        self._dying.add(task)
        task.add_done_callback(self._dying.discard)

    async def _reap(self, worker: _WorkerProcess) -> bool:
        """Wait for a killed process; return whether it ended in time."""
        if not (ended := await worker.wait_ended(_KILL_SECONDS)):
            _log.error("a decoding process does not end although it was killed", pid=worker.pid)
        return ended

    def _fits(self, width: int, height: int) -> bool:
        return width * height <= self._max_pixels and max(width, height) <= self._max_side

    def _refusal(self, verdict: bytes, width: int, height: int, field: str) -> ServerError:
        match verdict:
            case worker_program.NOT_AN_IMAGE:
                return UnsupportedMedia(f"{field} is not a {describe_formats(self._formats)} picture.", field=field)
            case worker_program.TOO_LARGE:
                most = f"{self._max_pixels} pixels and {self._max_side} a side"
                return InvalidInput(f"{field} has {width} × {height} pixels; {most} are taken.", field=field)
            case worker_program.NO_MEMORY:
                return InvalidInput(f"{field} takes too much memory to decode.", field=field)
            case _:
                return InvalidInput(f"{field} is a broken picture.", field=field)


class _Died(Exception):
    """The process ended before it answered completely."""


class _WorkerProcess:
    """One decoding process, which answers one request at a time over a socket that is its stdin and stdout.

    A socket instead of asyncio's pipes, because those close only after they were read to the end, which may never
    come. Raises `OSError` if the process cannot be started.
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
        self.images = 0

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    async def ask(
        self, kind: int, data: bytes, fits: Callable[[int, int], bool], sign: Callable[[bytes], bytes] | None
    ) -> tuple[bytes, int, int, NDArray[np.uint8]]:
        """Send a file; return verdict, width, height and pixels or result. Signs once if asked. Raises `_Died`.

        After any exception, including cancellation, the process must not be reused. A process that a malicious image
        controls may answer anything, so a size over the limits is rejected.
        """
        loop = asyncio.get_running_loop()
        try:
            await loop.sock_sendall(self._socket, worker_program.REQUEST.pack(len(data), kind))
            await loop.sock_sendall(self._socket, data)
            verdict, width, height, answer = await self._read_answer(len(data) + _MAX_GROWTH, fits)
            if verdict == worker_program.TO_SIGN and sign is not None:
                signature = await asyncio.to_thread(sign, answer.tobytes())
                await loop.sock_sendall(self._socket, worker_program.SIGNATURE.pack(len(signature)) + signature)
                verdict, width, height, answer = await self._read_answer(len(data) + _MAX_GROWTH, fits)
        except OSError as error:
            raise _Died from error
        self.images += 1
        return verdict, width, height, answer

    async def _read_answer(
        self, most: int, fits: Callable[[int, int], bool]
    ) -> tuple[bytes, int, int, NDArray[np.uint8]]:
        verdict, width, height = worker_program.ANSWER.unpack((await self._read(worker_program.ANSWER.size)).data)
        size = {worker_program.PIXELS: width * height * 3}.get(verdict, 0)
        if verdict in (worker_program.RESULT, worker_program.TO_SIGN):
            size = width
        if (size > most and verdict != worker_program.PIXELS) or (
            verdict == worker_program.PIXELS and not fits(width, height)
        ):
            raise _Died
        return verdict, width, height, await self._read(size)

    def kill(self) -> None:
        """Kill the process and close the socket, without waiting."""
        self._process.kill()
        self._socket.close()

    async def wait_ended(self, seconds: float) -> bool:
        """Wait up to `seconds` for a killed process; return whether it ended and was reaped."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        while self._process.poll() is None:
            if loop.time() > deadline:
                return False
            await asyncio.sleep(_POLL_INTERVAL)
        return True

    async def _read(self, size: int) -> NDArray[np.uint8]:
        """Read `size` bytes. Raises `_Died` if the process ends before."""
        loop, data, read = asyncio.get_running_loop(), np.empty(size, np.uint8), 0
        while read < size:
            count = await loop.sock_recv_into(self._socket, data[read:].data)
            if count == 0:
                raise _Died
            read += count
            await asyncio.sleep(0)  # sock_recv_into does not yield while data is available
        return data
