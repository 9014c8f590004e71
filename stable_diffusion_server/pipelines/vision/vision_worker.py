"""Asks a process of its own to run models that look at pictures, so that a file that crashes it costs one request."""

from __future__ import annotations

import asyncio
import json
import math
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import structlog

from stable_diffusion_server.concurrency import FairLimiter
from stable_diffusion_server.errors import ModelLoadError, NotReady
from stable_diffusion_server.imaging import Pixels
from stable_diffusion_server.pipelines.library.file_headers import shown
from stable_diffusion_server.pipelines.vision.vision_messages import (
    HEAD,
    MOST_BOXES,
    MOST_JSON,
    NO_MEMORY,
    FoundBox,
    head_of,
    packed,
)

_log = structlog.get_logger(__name__)

# The program of the process, and the folder that holds the package, which it imports.
PROGRAM = Path(__file__).with_name("vision_program.py")
_PACKAGE = Path(__file__).resolve().parents[3]
# All that the process knows of its surroundings: no accelerator, no hub, few arenas of memory.
_ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "MALLOC_ARENA_MAX": "2",
    "HOME": "/nonexistent",
}
_KILL_SECONDS, _POLL_INTERVAL = 5.0, 0.005
_SENTENCE = 500
# Requests after which the process is replaced, so that what leaks does not gather.
_REQUESTS_PER_PROCESS = 500


class PictureModels(Protocol):
    """Runs models that look at pictures. Pixels are uint8, height × width × 3, RGB; `share` identifies the caller.

    Callers take turns. The methods raise `ModelLoadError` with one sentence if a file cannot be used, crashed or took
    too long, `NotReady` if no process can be started.
    """

    async def control_image(
        self, method: str, files: Sequence[Path], pixels: Pixels, options: Mapping[str, float], *, share: str = ...
    ) -> Pixels:
        """Return the control image that a method of the preprocessors' table makes, of the same size."""

    async def detect(self, file: Path, pixels: Pixels, *, least_score: float = ..., share: str = ...) -> list[FoundBox]:
        """Return the boxes that a detector finds, the highest score first, at most 300."""

    async def classify(self, file: Path, pixels: Pixels, *, share: str = ...) -> list[tuple[str, float]]:
        """Return labels with scores from 0 to 1 by a classifier, a file or a folder, the highest first."""


class VisionWorker:
    """`PictureModels` in one process, which starts with the first request. Use it on one event loop.

    A process that crashes, hangs, answers nonsense or has no memory left is killed, and the next request gets another.

    Args:
        memory: Bytes of address space beyond what the idle process uses.
        seconds: Time limit of a request, loading included.
        threads: Threads that compute.
        idle_seconds: The process ends after so long without a request, which frees its memory.
        program: Path of the program that the process runs.
    """

    def __init__(
        self,
        *,
        memory: int = 8 * 2**30,
        seconds: float = 120.0,
        threads: int = 2,
        idle_seconds: float = 600.0,
        program: Path = PROGRAM,
    ) -> None:
        self._command = [
            sys.executable, "-I", str(program), str(_PACKAGE), str(memory), str(int(seconds) + 1), str(threads),
        ]  # fmt: skip
        self._seconds, self._idle_seconds = seconds, idle_seconds
        # Without a bound per caller: who waits here was admitted already, and may have drawn its picture before.
        self._turn = FairLimiter(1)
        self._process: _VisionProcess | None = None
        self._idle: asyncio.TimerHandle | None = None
        self._dying: set[asyncio.Task[None]] = set()
        self._closed = False

    async def control_image(
        self, method: str, files: Sequence[Path], pixels: Pixels, options: Mapping[str, float], *, share: str = ""
    ) -> Pixels:
        """Return a control image of the same size; see `PictureModels`."""
        body, data = await self._asked(method, files, pixels, options, share)
        if (body.get("height"), body.get("width")) != pixels.shape[:2] or data.size != pixels.size:
            raise ModelLoadError("The process for models answered another picture than one of the same size.")
        return data.reshape(pixels.shape)

    async def detect(self, file: Path, pixels: Pixels, *, least_score: float = 0.3, share: str = "") -> list[FoundBox]:
        """Return the boxes that a detector finds; see `PictureModels`."""
        body, _ = await self._asked("detect", [file], pixels, {"score": least_score}, share)
        try:
            return [_box(*box) for box in body["boxes"][:MOST_BOXES]]
        except (KeyError, TypeError, ValueError) as error:
            raise ModelLoadError("The process for models answered no boxes.") from error

    async def classify(self, file: Path, pixels: Pixels, *, share: str = "") -> list[tuple[str, float]]:
        """Return labels with scores; see `PictureModels`."""
        body, _ = await self._asked("classify", [file], pixels, {}, share)
        try:
            return [(shown(label), _number(score)) for label, score in body["labels"]]
        except (KeyError, TypeError, ValueError) as error:
            raise ModelLoadError("The process for models answered no labels.") from error

    async def close(self) -> None:
        """Kill the process and wait up to 5 seconds for it. Later requests raise `NotReady`."""
        self._closed = True
        self._end()
        if self._dying:
            await asyncio.wait(self._dying, timeout=_KILL_SECONDS)

    async def _asked(
        self, method: str, files: Sequence[Path], pixels: Pixels, options: Mapping[str, float], share: str
    ) -> tuple[dict[str, Any], Pixels]:
        """The answer of the process: JSON and bytes. Raises what `PictureModels` says."""
        names = " and ".join(shown(file.name) for file in files)
        asked = {
            "method": method,
            "files": [str(file) for file in files],
            "options": dict(options),
            "height": pixels.shape[0],
            "width": pixels.shape[1],
        }
        async with self._turn.hold(share):
            try:
                async with asyncio.timeout(self._seconds):
                    body, data = await self._answer(packed(asked, pixels.size), pixels)
            except TimeoutError as error:
                raise ModelLoadError(f"{names} took too long.") from error
            except _Ended as error:
                _log.warning("the process for models ended on a picture", method=method, files=names)
                raise ModelLoadError(f"{names} ended the process that runs models.") from error
        if body.get("verdict") == NO_MEMORY:
            raise ModelLoadError(f"{names} needs more memory than models that look at pictures may take.")
        if "verdict" in body:
            named, sentence = (shown(str(body.get(key, "")), _SENTENCE) for key in ("file", "sentence"))
            raise ModelLoadError(f"{named} cannot be used. {sentence}")
        return body, data

    async def _answer(self, asked: bytes, pixels: Pixels) -> tuple[dict[str, Any], Pixels]:
        """Ask the process, or another one if it ended while it was idle. Raises `_Ended`, `NotReady`."""
        if self._process is not None and self._process.has_ended:
            self._end()
        process = self._process or self._start()
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None
        answered = False
        try:
            answer = await process.ask(asked, pixels)
            answered = True
            return answer
        finally:
            # No await here: a cancelled caller must end the process too, which computes for nobody.
            if not answered or process.requests >= _REQUESTS_PER_PROCESS or self._closed:
                self._end()
            else:
                self._idle = asyncio.get_running_loop().call_later(self._idle_seconds, self._end)

    def _start(self) -> _VisionProcess:
        if self._closed:
            raise NotReady("The server is going down.", retry_after=5)
        try:
            self._process = _VisionProcess(self._command)
        except OSError as error:
            _log.error("no process for models can be started", reason=str(error))
            raise NotReady("No process can be started to look at pictures.", retry_after=5) from error
        return self._process

    def _end(self) -> None:
        """Kill the process now, and reap it in the background."""
        process, self._process = self._process, None
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None
        if process is not None:
            process.kill()
            task = asyncio.get_running_loop().create_task(process.reap())
            self._dying.add(task)
            task.add_done_callback(self._dying.discard)


def _box(left: Any, top: Any, right: Any, bottom: Any, score: Any, number: Any, label: Any) -> FoundBox:
    """A box that the process answered. Raises `ValueError` or `TypeError` if it is none."""
    place = _number(left), _number(top), _number(right), _number(bottom)
    return FoundBox(*place, _number(score), int(_number(number)), shown(label))


def _number(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError("not a finite number")
    return number


class _Ended(Exception):
    """The process ended before it answered completely, or answered nonsense."""


class _VisionProcess:
    """One process, which answers one request at a time over a socket that is its stdin and stdout.

    Raises `OSError` if it cannot be started.
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
                    env=_ENVIRONMENT,
                    cwd=Path(sys.executable).anchor,
                )
            except BaseException:
                self._socket.close()
                raise
        self._socket.setblocking(False)
        self.requests = 0

    @property
    def has_ended(self) -> bool:
        """Whether the process has ended."""
        return self._process.poll() is not None

    async def ask(self, asked: bytes, pixels: Pixels) -> tuple[dict[str, Any], Pixels]:
        """Send a request; return JSON and bytes. Raises `_Ended`; the process is not used again then.

        A process that a file controls may answer anything, so more bytes than the request had are rejected.
        """
        loop, data = asyncio.get_running_loop(), np.ascontiguousarray(pixels)
        try:
            await loop.sock_sendall(self._socket, asked)
            await loop.sock_sendall(self._socket, data.reshape(-1).data)
            length, size = head_of((await self._read(HEAD.size)).tobytes())
            if length > MOST_JSON or size > data.nbytes:
                raise _Ended
            body = json.loads((await self._read(length)).tobytes())
            answer = await self._read(size)
        except (OSError, ValueError, RecursionError) as error:
            raise _Ended from error
        if not isinstance(body, dict):
            raise _Ended
        self.requests += 1
        return body, answer

    def kill(self) -> None:
        """Kill the process and close the socket, without waiting."""
        self._process.kill()
        self._socket.close()

    async def reap(self) -> None:
        """Wait for the killed process."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + _KILL_SECONDS
        while self._process.poll() is None:
            if loop.time() > deadline:
                _log.error("a process for models does not end although it was killed", pid=self._process.pid)
                return
            await asyncio.sleep(_POLL_INTERVAL)

    async def _read(self, size: int) -> Pixels:
        """Read `size` bytes. Raises `_Ended` if the process ends before."""
        loop, data, read = asyncio.get_running_loop(), np.empty(size, np.uint8), 0
        while read < size:
            count = await loop.sock_recv_into(self._socket, data[read:].data)
            if count == 0:
                raise _Ended
            read += count
            await asyncio.sleep(0)  # sock_recv_into does not yield while data is available
        return data
