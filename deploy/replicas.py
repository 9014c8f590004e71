"""One replica of several, independent of Ray: its own folder, job lookup across replicas, draining at shutdown.

Uses only the application's public interface (`app.state` and its routes) and ASGI.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from fastapi import FastAPI
from filelock import FileLock, Timeout
from pydantic import SecretStr
from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope, Send

from stable_diffusion_server.api.problems import error_response
from stable_diffusion_server.engine import EngineState
from stable_diffusion_server.errors import NotReady
from stable_diffusion_server.settings import Settings
from stable_diffusion_server.storage import ServerSecret

_FOLDER = "replica-{}"
_MOST_FOLDERS = 10_000
_TAG = re.compile(r"/jobs/r(\d{1,4})-")
_JOB = re.compile(r"/jobs/([^/]+)")
_TAGGED = re.compile(r"r(\d{1,4})-")
# Paths whose objects may be held by another replica: jobs, and images waiting for upload.
_KEPT_ALONE = ("/jobs/", "/files/")
_LOOK_EVERY = 0.1


class ReplicaLease:
    """Locks a replica's own folder below DATA_DIR (`replica-0`, `replica-1` …): the first that no living process holds.

    The lock ends with the process, also after a crash, so the replacement finds the job store and the upload spool
    there and continues with them. Folders with a job store are tried first, because they may hold accepted jobs. On
    a network file system the server must support locks (NFS 4 does). A separate volume for each replica needs no
    locks.
    """

    def __init__(self, root: Path) -> None:
        """Lock a folder. Raises `OSError` for a root that cannot be written, or if all folders are in use."""
        root.mkdir(parents=True, exist_ok=True)
        left = _with_journal(root)
        for number in (*left, *(n for n in range(_MOST_FOLDERS) if n not in set(left))):
            lock = _lock_of(root, number)
            with suppress(Timeout):
                lock.acquire(blocking=False)
                self.number, self.folder, self._lock = number, root / _FOLDER.format(number), lock
                return
        raise OSError(f"{root} has {_MOST_FOLDERS} folders of replicas in use")

    def others(self) -> set[int]:
        """Numbers of the other folders with a job store, whether a replica holds them or not."""
        return set(_with_journal(self.folder.parent)) - {self.number}

    @property
    def tag(self) -> str:
        """Prefix of this replica's job ids."""
        return f"r{self.number}-"

    def settings(self, shared: Settings) -> Settings:
        """The shared settings with this replica's folder and job id prefix, and a common URL secret if none is set."""
        secret = shared.url_secret
        if not secret.get_secret_value():
            common = ServerSecret("", self.folder.parent / "url-secret")
            common.open()
            secret = SecretStr(common.value.hex())
        return shared.model_copy(update={"data_dir": self.folder, "job_id_prefix": self.tag, "url_secret": secret})

    def release(self) -> None:
        """Release the folder for another replica."""
        self._lock.release()


def _with_journal(root: Path) -> list[int]:
    return sorted(int(path.parent.name.rpartition("-")[2]) for path in root.glob("replica-*/journal.db"))


def _lock_of(root: Path, number: int) -> FileLock:
    return FileLock(root / f"{_FOLDER.format(number)}.lock", is_singleton=False)


def sticks_to(scope: Mapping[str, Any]) -> str | None:
    """The routing key of a request: requests with one key should reach the same replica. `None`: any replica will do.

    The key is the job id in the path, the request's own id or idempotency key, or the client for the UI and the
    AUTOMATIC1111 dialect (whose `progress` and `interrupt` refer to the client's own requests).
    """
    path, headers = str(scope.get("path", "")), Headers(raw=list(scope.get("headers", ())))
    if match := _JOB.match(path):
        return match[1]
    if key := headers.get("x-job-id") or headers.get("idempotency-key"):
        return key
    if path.startswith(("/ui", "/sdapi/")):
        return f"{(scope.get('client') or ('',))[0]} {headers.get('authorization', '')}"
    return None


def owner_of(key: str) -> int | None:
    """The folder number in a prefixed job id; `None` if it has no prefix."""
    match = _TAGGED.match(key)
    return int(match[1]) if match else None


def ranked(key: str, numbers: list[int]) -> list[int]:
    """Folder numbers sorted by preference for a key (rendezvous hashing).

    Adding or removing a folder moves only that folder's keys (Thaler and Ravishankar, "Using name-based mappings to
    increase hit rates", 1998).
    """
    return sorted(numbers, key=lambda number: hashlib.sha256(f"{number} {key}".encode()).digest())


class Peers(Protocol):
    """Calls to the other replicas."""

    async def holding(self, scope: Scope) -> dict[int, bool]:
        """Folder number → whether that replica has what a request asks for, for the replicas that respond."""

    def ask(self, number: int, scope: Scope) -> AsyncIterator[Message]:
        """A replica's response, as ASGI messages."""


class ReplicaApp:
    """ASGI wrapper of the application: delays startup until models are loaded, and shutdown until accepted jobs end.

    If this replica lacks a job or file, it asks `peers`. If none has the job but it may be in a folder whose
    replica does not respond, the response is 503 with `Retry-After`, because the next replica with that folder
    continues its jobs.
    """

    def __init__(
        self, app: FastAPI, claim: ReplicaLease, peers: Peers, *, drain_seconds: float, release: Callable[[], object]
    ) -> None:
        self._app = app
        self._claim = claim
        self._peers = peers
        self._drain_seconds = drain_seconds
        self._release = release

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request, or the application's lifespan."""
        if scope["type"] == "lifespan":
            await self._live(scope, receive, send)
        elif scope["type"] == "http" and scope["path"].startswith(_KEPT_ALONE):
            await self._find(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def has(self, scope: Scope) -> bool:
        """Whether this replica has what a request asks for. Calls its own routes with the caller's credentials."""
        path = scope["path"].removesuffix("/events") if scope["path"].startswith("/jobs/") else scope["path"]
        status = 404

        async def send(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)

        method = "GET" if path.startswith("/jobs/") else "HEAD"
        asked = {**_fresh(scope), "path": path, "raw_path": None, "method": method}
        await self._app(asked, _nothing_comes, send)
        return status != 404

    async def answer(self, scope: Scope) -> AsyncIterator[Message]:
        """Response of this replica to a request that another replica received."""
        messages: asyncio.Queue[Message | None] = asyncio.Queue()

        async def run() -> None:
            try:
                await self._app(_fresh(scope), _nothing_comes, messages.put)
            finally:
                await messages.put(None)

        running = asyncio.create_task(run())
        try:
            while (message := await messages.get()) is not None:
                yield message
        finally:
            running.cancel()

    async def _find(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Respond from this replica, or from another one if this one returns 404."""
        unsent: list[Message] = []

        async def watch(message: Message) -> None:
            if message.get("status") == 404 or unsent:
                unsent.append(message)
            else:
                await send(message)

        asked = _fresh(scope)
        await self._app(scope, receive, watch)
        if not unsent:
            return
        holding = await self._peers.holding(asked)
        for number in (number for number, there in holding.items() if there):
            async for message in self._peers.ask(number, asked):
                await send(message)
            return
        if self._cannot_be_told(scope["path"], holding.keys()):
            error = NotReady("A replica that may keep this is not running just now.", retry_after=5)
            await error_response(error, scope["path"], str(scope.get("state", {}).get("request_id", "")))(
                scope, receive, send
            )
            return
        for message in unsent:
            await send(message)

    def _cannot_be_told(self, path: str, answering: Collection[int]) -> bool:
        """Whether a job may be in a folder whose replica did not respond: the one in its id, otherwise any."""
        if not path.startswith("/jobs/"):
            return False
        silent = self._claim.others() - set(answering)
        named = _TAG.match(path)
        return bool(silent) if named is None else int(named[1]) in silent

    async def _live(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def begin_and_end() -> Message:
            message = await receive()
            if message["type"] == "lifespan.shutdown":
                await self._until(lambda: not self._app.state.jobs.unfinished, self._drain_seconds)
            return message

        async def tell(message: Message) -> None:
            if message["type"] == "lifespan.startup.complete":
                await self._until(self._begun, float("inf"))
            await send(message)

        try:
            await self._app(scope, begin_and_end, tell)
        finally:
            self._release()

    def _begun(self) -> bool:
        """Whether the models are loaded. Raises `RuntimeError` if loading failed, so that another replica is tried."""
        engine = self._app.state.engine
        if engine.state is EngineState.FAILED:
            raise RuntimeError(engine.reason)
        return engine.state is EngineState.READY

    async def _until(self, condition: Callable[[], bool], seconds: float) -> None:
        end = time.monotonic() + seconds
        while not condition() and time.monotonic() < end:  # noqa: ASYNC110  # the state changes on another thread
            await asyncio.sleep(_LOOK_EVERY)


class ReplicaHealth:
    """Decides whether a replica should be replaced. Call `fault` periodically.

    The time without a heartbeat is measured from when the last one was seen, by the monotonic clock.
    """

    def __init__(self, settings: Settings) -> None:
        self._hang = settings.watchdog_timeout
        self._progress = settings.data_dir / "progress.txt"
        self._sign = 0
        self._seen_at = time.monotonic()

    def fault(self, app: FastAPI) -> str:
        """The reason for a replacement, as a sentence; empty if there is none.

        Reasons are a device that cannot generate images, and running requests without a heartbeat for
        `WATCHDOG_TIMEOUT`. An unreachable storage is no reason, although `/readyz` reports it: images are
        spooled, and another process could not reach it either.
        """
        engine = app.state.engine
        if engine.state not in (EngineState.READY, EngineState.LOADING):
            return str(engine.reason)
        try:
            sign = self._progress.stat().st_mtime_ns
        except OSError:
            sign = 0  # no heartbeat yet
        if sign != self._sign or not engine.running:
            self._sign, self._seen_at = sign, time.monotonic()
        silent = time.monotonic() - self._seen_at
        if sign and 0 < self._hang < silent:
            return f"There was no sign of life for {silent:.0f} s with pictures under way."
        return ""


def work_of(app: FastAPI) -> int:
    """Number of waiting and running images, from requests and jobs."""
    engine = app.state.engine
    return int(engine.waiting + engine.running + app.state.jobs.waiting)


def _fresh(scope: Scope) -> Scope:
    """The scope without what middleware added, which cannot be pickled and means nothing elsewhere."""
    kept = ("type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string", "headers")
    return {name: scope[name] for name in (*kept, "root_path", "client", "server") if name in scope}


async def _nothing_comes() -> Message:
    """`receive` for a request without a body: blocks as if the client stayed connected."""
    await asyncio.Event().wait()
    raise AssertionError("nothing sets that event")
