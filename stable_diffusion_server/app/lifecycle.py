"""Shutdown: drains on a signal, closes connections, and ends a process whose device is lost."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Exit status of a process that lost its device: only a new process can use it. The watchdog then restarts it.
DEVICE_LOST_STATUS = 86
# Two signals within this time count as one: systemd and `docker compose` signal every process, and the watchdog
# forwards its own.
_SAME_SIGNAL_SECONDS = 0.5
# Time to send pending responses, which ask callers to retry later.
_FINAL_RESPONSE_SECONDS = 1.0
# Time for a newly accepted connection to send its request.
_ARRIVAL_SECONDS = 0.25
_POLL_SECONDS = 0.02


class ProcessHooks:
    """Callbacks for application events that concern the process. They may run on any thread."""

    def ready(self) -> None:
        """Called when the models are loaded and the server is ready. Does nothing by default."""

    def libraries_loaded(self) -> None:
        """Called after large long-lived objects (models, Gradio) were loaded. Does nothing by default."""

    def device_lost(self) -> None:
        """Called when only a new process can use the device. Ends this process by default."""
        exit_soon()


def exit_soon() -> None:
    """End the process after one second with `DEVICE_LOST_STATUS`, so that its supervisor starts a new one.

    Skips the normal shutdown, which may wait for the lost device forever.
    """

    def leave() -> None:
        time.sleep(_FINAL_RESPONSE_SECONDS)
        os._exit(DEVICE_LOST_STATUS)

    threading.Thread(target=leave, name="exit", daemon=True).start()


class Shutdown:
    """Keeps the server listening while running work ends, so that new requests get 503 instead of a broken connection.

    `working` returns whether generations are still running; `grace` is their maximum time in seconds.
    """

    def __init__(self, working: Callable[[], bool], grace: float) -> None:
        self._working = working
        self._grace = grace
        self._since: float | None = None
        self._requests: set[object] = set()
        self._earlier: set[object] = set()

    @property
    def stopping(self) -> bool:
        """Whether a stop signal has arrived."""
        return self._since is not None

    def seconds_left(self) -> float:
        """Return the seconds left for running work."""
        return self._grace if self._since is None else max(0.0, self._grace - (time.monotonic() - self._since))

    def begin(self) -> None:
        """Start the grace period; the shutdown waits for requests that run now."""
        self._since, self._earlier = time.monotonic(), set(self._requests)

    def started(self, request: object) -> None:
        """Count a request that has arrived."""
        self._requests.add(request)

    def finished(self, request: object) -> None:
        """Count a request that was answered."""
        self._requests.discard(request)
        self._earlier.discard(request)

    def finish(self, server: uvicorn.Server, loop: asyncio.AbstractEventLoop) -> None:
        """Wait for running work, stop listening, then wait for the last responses. Blocks: call it on a thread."""
        while (self._earlier or self._working()) and self.seconds_left():
            time.sleep(_POLL_SECONDS)
        for listening in server.servers:
            loop.call_soon_threadsafe(listening.close)
        end = time.monotonic() + _FINAL_RESPONSE_SECONDS
        time.sleep(_ARRIVAL_SECONDS)
        while self._requests and time.monotonic() < end:
            time.sleep(_POLL_SECONDS)
        if server.config.timeout_graceful_shutdown is None:
            server.config.timeout_graceful_shutdown = math.ceil(self.seconds_left()) + 1


class CloseConnectionsMiddleware:
    """ASGI middleware that adds `Connection: close` to responses once the server stops."""

    def __init__(self, app: ASGIApp, shutdown: Shutdown) -> None:
        self._app = app
        self._shutdown = shutdown

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_and_close(message: Message) -> None:
            if message["type"] == "http.response.start" and self._shutdown.stopping:
                message = {**message, "headers": [*message.get("headers", ()), (b"connection", b"close")]}
            await send(message)

        request = object()
        self._shutdown.started(request)
        try:
            await self._app(scope, receive, send_and_close)
        finally:
            self._shutdown.finished(request)


@contextmanager
def drain_on_signal(shutdown: Shutdown, *drains: Callable[[], object]) -> Iterator[None]:
    """Within the context, SIGTERM and SIGINT first call `drains`, then shut down. A second signal exits immediately.

    uvicorn's own handler closes the sockets first, which breaks later requests, so it runs after the work ended.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # Python sets signal handlers on the main thread only; tests use other threads
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    loop = asyncio.get_running_loop()
    stopping_since: float | None = None

    def drain(number: int, frame: FrameType | None) -> None:
        nonlocal stopping_since
        now = time.monotonic()
        if stopping_since is not None:
            if now - stopping_since > _SAME_SIGNAL_SECONDS:
                os._exit(128 + number)  # accepted jobs are safe in the job store
            return
        stopping_since = now
        handler = before[signal.Signals(number)]
        server = getattr(handler, "__self__", None)

        def finish_server() -> None:
            if isinstance(server, uvicorn.Server):
                shutdown.finish(server, loop)
                server.handle_exit(number, frame)

        shutdown.begin()
        for call in (*drains, finish_server):
            # On another thread: the signal may have interrupted code that holds a lock which `call` needs.
            threading.Thread(target=call, name="drain", daemon=True).start()
        if callable(handler) and not isinstance(server, uvicorn.Server):
            handler(number, frame)

    for number in before:
        signal.signal(number, drain)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
