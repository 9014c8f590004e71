"""Ends: a signal drains the engine before the server program waits; a lost device ends the process."""

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

# What a process exits with whose device can only be used again by another one.
POISONED = 86
# A signal that comes twice within so many seconds is one: systemd and `docker compose` tell every process, and the
# watchdog passes on its own.
_SAME_SIGNAL_SECONDS = 0.5
# For the answers under way, which tell their callers to come back.
_LAST_WORDS_SECONDS = 1.0
# For the request of a connection that was just taken.
_ARRIVING_SECONDS = 0.25
_LOOK_EVERY = 0.02


def exit_soon() -> None:
    """End the process in a moment with its own exit status, so that whoever supervises it starts another.

    Not by the ordinary way out: what would be closed there may wait for the lost device for ever.
    """

    def leave() -> None:
        time.sleep(_LAST_WORDS_SECONDS)
        os._exit(POISONED)

    threading.Thread(target=leave, name="leave", daemon=True).start()


class Shutdown:
    """What is under way while the server stops: new requests are answered, and their connections closed after that.

    `working` tells whether pictures are still being drawn, `grace` the seconds they may take. Until then the server
    listens, so that who comes is refused with 503 and not by a connection that breaks off.
    """

    def __init__(self, working: Callable[[], bool], grace: float) -> None:
        self._working = working
        self._grace = grace
        self._since: float | None = None
        self._under_way: set[object] = set()
        self._before: set[object] = set()

    @property
    def stopping(self) -> bool:
        """Whether a signal has come."""
        return self._since is not None

    def seconds_left(self) -> float:
        """How long what is being drawn may still take."""
        return self._grace if self._since is None else max(0.0, self._grace - (time.monotonic() - self._since))

    def begin(self) -> None:
        """A signal has come; what is under way now is waited for."""
        self._since, self._before = time.monotonic(), set(self._under_way)

    def entered(self, request: object) -> None:
        """A request has come."""
        self._under_way.add(request)

    def left(self, request: object) -> None:
        """A request was answered."""
        self._under_way.discard(request)
        self._before.discard(request)

    def finish(self, server: uvicorn.Server, loop: asyncio.AbstractEventLoop) -> None:
        """Wait for what is under way, then listen no more and answer who had connected. Blocks; not on the loop."""
        while (self._before or self._working()) and self.seconds_left():
            time.sleep(_LOOK_EVERY)
        for listening in server.servers:
            loop.call_soon_threadsafe(listening.close)
        end = time.monotonic() + _LAST_WORDS_SECONDS
        time.sleep(_ARRIVING_SECONDS)  # a connection may be there whose request is still on its way
        while self._under_way and time.monotonic() < end:
            time.sleep(_LOOK_EVERY)
        if server.config.timeout_graceful_shutdown is None:
            server.config.timeout_graceful_shutdown = math.ceil(self.seconds_left()) + 1


class CloseConnectionsMiddleware:
    """ASGI middleware: has clients close their connection after an answer, once the server stops."""

    def __init__(self, app: ASGIApp, shutdown: Shutdown) -> None:
        self._app = app
        self._shutdown = shutdown

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_and_close(message: Message) -> None:
            if message["type"] == "http.response.start" and self._shutdown.stopping:
                message = {**message, "headers": [*message.get("headers", ()), (b"connection", b"close")]}
            await send(message)

        request = object()
        self._shutdown.entered(request)
        try:
            await self._app(scope, receive, send_and_close)
        finally:
            self._shutdown.left(request)


@contextmanager
def drain_on_signal(shutdown: Shutdown, *drains: Callable[[], object]) -> Iterator[None]:
    """Have a signal take no more work, before what the server program does with it; a second one end all at once.

    uvicorn closes its sockets first, and breaks off who comes while pictures are drawn: it is told when they are.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # a test's event loop: signals are not its business
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    loop = asyncio.get_running_loop()
    stopping_since: float | None = None

    def drain(number: int, frame: FrameType | None) -> None:
        nonlocal stopping_since
        now = time.monotonic()
        if stopping_since is not None:
            if now - stopping_since > _SAME_SIGNAL_SECONDS:
                os._exit(128 + number)  # what was accepted is in the journal
            return
        stopping_since = now
        handler = before[signal.Signals(number)]
        server = getattr(handler, "__self__", None)

        def hand_over() -> None:
            if isinstance(server, uvicorn.Server):
                shutdown.finish(server, loop)
                server.handle_exit(number, frame)

        shutdown.begin()
        for call in (*drains, hand_over):
            # On a thread of its own: a handler may interrupt the holder of the very lock it needs.
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
