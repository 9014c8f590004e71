"""What a replica is, whatever runs it: a folder of its own, jobs found again, an end that waits. Knows no Ray.

Needs only what is public of the application (`app.state`, its doors), and ASGI.
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
# What one replica does not have may be with another: its jobs, and pictures that wait for the storage.
_KEPT_ALONE = ("/jobs/", "/files/")
_LOOK_EVERY = 0.1


class ReplicaLease:
    """A replica's own folder below DATA_DIR, `replica-0`, `replica-1` …: the first that no living process holds.

    The lock ends with the process, however that ends, so the replica that takes its place finds its journal and spool
    there and goes on with them. Folders with a journal come first: they may hold accepted jobs. On a network file
    system the locks must be kept by its server (NFS 4 does); a volume of its own for each replica needs none.
    """

    def __init__(self, root: Path) -> None:
        """Take a folder. Raises `OSError` for a root that cannot be written."""
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
        """The other folders with a journal, whether a replica holds them or not."""
        return set(_with_journal(self.folder.parent)) - {self.number}

    @property
    def tag(self) -> str:
        """What the ids of its jobs begin with."""
        return f"r{self.number}-"

    def settings(self, shared: Settings) -> Settings:
        """The settings all replicas share, with this one's folder and tag, and a secret of all where none is set."""
        secret = shared.url_secret
        if not secret.get_secret_value():
            common = ServerSecret("", self.folder.parent / "url-secret")
            common.open()
            secret = SecretStr(common.value.hex())
        return shared.model_copy(update={"data_dir": self.folder, "job_id_prefix": self.tag, "url_secret": secret})

    def release(self) -> None:
        """Let another replica have it."""
        self._lock.release()


def _with_journal(root: Path) -> list[int]:
    return sorted(int(path.parent.name.rpartition("-")[2]) for path in root.glob("replica-*/journal.db"))


def _lock_of(root: Path, number: int) -> FileLock:
    return FileLock(root / f"{_FOLDER.format(number)}.lock", is_singleton=False)


def sticks_to(scope: Mapping[str, Any]) -> str | None:
    """What a request has in common with those that the same replica should answer; `None`: any replica will do.

    A job by its id, a request by the id it gives itself or by its idempotency key, and a browser's studio and the
    AUTOMATIC1111 dialect (whose `progress` and `interrupt` mean one's own) by the client.
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
    """The number of the folder that a tagged id names."""
    match = _TAGGED.match(key)
    return int(match[1]) if match else None


def ranked(key: str, numbers: list[int]) -> list[int]:
    """Folders in the order in which a key belongs to them, by rendezvous hashing.

    One that comes or goes moves only the keys that are its own (Thaler and Ravishankar, "Using name-based mappings to
    increase hit rates", 1998).
    """
    return sorted(numbers, key=lambda number: hashlib.sha256(f"{number} {key}".encode()).digest())


class Peers(Protocol):
    """The other replicas."""

    async def holding(self, scope: Scope) -> dict[int, bool]:
        """The folders of those that answer, and whether they have what a request asks for."""

    def ask(self, number: int, scope: Scope) -> AsyncIterator[Message]:
        """Its answer, as ASGI messages."""


class ReplicaApp:
    """ASGI around the application: it starts when it can draw, and ends when its accepted jobs have.

    What this replica does not have is asked of `peers`. A job that none has and that may be in a folder of which no
    replica tells just now is answered 503 with `Retry-After`, since whoever takes that folder goes on with its jobs.
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
        """Answer one request, or live through the application's life."""
        if scope["type"] == "lifespan":
            await self._live(scope, receive, send)
        elif scope["type"] == "http" and scope["path"].startswith(_KEPT_ALONE):
            await self._find(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def has(self, scope: Scope) -> bool:
        """Whether this replica has what a request asks for: its own doors are asked, with the caller's own rights."""
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
        """What this replica answers to a request that came to another."""
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
        """Answer as this replica does, or, where it has not what is asked for, as the one that has."""
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
        """Whether a job may be in a folder no replica answered for: in that which its id names, else in any."""
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
        """Whether the models are loaded. Raises `RuntimeError` if they cannot be, so that another replica is tried."""
        engine = self._app.state.engine
        if engine.state is EngineState.FAILED:
            raise RuntimeError(engine.reason)
        return engine.state is EngineState.READY

    async def _until(self, condition: Callable[[], bool], seconds: float) -> None:
        end = time.monotonic() + seconds
        while not condition() and time.monotonic() < end:  # noqa: ASYNC110  # what is looked at is another thread's
            await asyncio.sleep(_LOOK_EVERY)


class ReplicaHealth:
    """Tells why a replica should be replaced; asked again and again.

    Silence is measured from when the last sign of life was seen, by a clock that is never set.
    """

    def __init__(self, settings: Settings) -> None:
        self._hang = settings.watchdog_timeout
        self._progress = settings.data_dir / "progress.txt"
        self._sign = 0
        self._seen_at = time.monotonic()

    def fault(self, app: FastAPI) -> str:
        """Why, in a sentence; empty while there is no reason.

        A device that cannot draw, or one with work in hand and no sign of life for `WATCHDOG_TIMEOUT`. A storage that
        is down is no reason, although `/readyz` names it: what is drawn is spooled, and another process would fare no
        better.
        """
        engine = app.state.engine
        if engine.state not in (EngineState.READY, EngineState.LOADING):
            return str(engine.reason)
        try:
            sign = self._progress.stat().st_mtime_ns
        except OSError:
            sign = 0  # nothing was drawn yet
        if sign != self._sign or not engine.running:
            self._sign, self._seen_at = sign, time.monotonic()
        silent = time.monotonic() - self._seen_at
        if sign and 0 < self._hang < silent:
            return f"There was no sign of life for {silent:.0f} s with pictures under way."
        return ""


def work_of(app: FastAPI) -> int:
    """Pictures that wait and that are drawn, requests and jobs."""
    engine = app.state.engine
    return int(engine.waiting + engine.running + app.state.jobs.waiting)


def _fresh(scope: Scope) -> Scope:
    """A request as it came in: what doors add to it cannot travel, and means nothing elsewhere."""
    kept = ("type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string", "headers")
    return {name: scope[name] for name in (*kept, "root_path", "client", "server") if name in scope}


async def _nothing_comes() -> Message:
    """The rest of a request without a body, from a client that stays."""
    await asyncio.Event().wait()
    raise AssertionError("nothing sets that event")
