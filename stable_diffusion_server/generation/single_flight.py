"""Single flight: callers who want the same thing share one effort, and the last to leave ends it. Knows no pictures."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from stable_diffusion_server.types import GenerationProgress

T = TypeVar("T")


class ProgressListener(Protocol):
    """Someone who follows an effort."""

    @property
    def wants_previews(self) -> bool:
        """Whether small pictures on the way are of use."""

    def on_progress(self, news: GenerationProgress) -> None:
        """Take one piece of news, on the event loop."""


@dataclass(frozen=True, slots=True, eq=False)
class CallbackListener:
    """A listener that passes news on to a function. `previews` may change while it listens, as a function."""

    watch: Callable[[GenerationProgress], None]
    previews: bool | Callable[[], bool] = False

    @property
    def wants_previews(self) -> bool:
        """Whether small pictures on the way are of use now."""
        return self.previews() if callable(self.previews) else self.previews

    def on_progress(self, news: GenerationProgress) -> None:
        """Pass it on."""
        self.watch(news)


NO_LISTENER = CallbackListener(lambda news: None)


@dataclass(slots=True, eq=False)
class ProgressBroadcaster:
    """All who follow one effort, itself a listener, so that an effort can follow another it waits for.

    Who comes late is told the latest news at once.
    """

    _listeners: list[ProgressListener] = field(default_factory=list)
    _latest: GenerationProgress | None = None

    @property
    def wants_previews(self) -> bool:
        """Whether any of them has a use for previews."""
        return any(listener.wants_previews for listener in self._listeners)

    def on_progress(self, news: GenerationProgress) -> None:
        """Tell every one of them."""
        self._latest = news
        for listener in tuple(self._listeners):
            listener.on_progress(news)

    def add(self, listener: ProgressListener) -> None:
        """Let someone follow from here on."""
        self._listeners.append(listener)
        if self._latest is not None:
            listener.on_progress(self._latest)

    def remove(self, listener: ProgressListener) -> None:
        """Tell someone no more."""
        self._listeners.remove(listener)


Start = Callable[[ProgressBroadcaster], Coroutine[Any, Any, T]]


@dataclass(slots=True)
class _Flight(Generic[T]):
    task: asyncio.Task[T]
    tag: str
    audience: ProgressBroadcaster
    passengers: int = 0
    abandoned: bool = False


class SingleFlight(Generic[T]):
    """Efforts under way, by key. Lives on one event loop.

    `tag` says what exactly is being done under a key: callers with another tag do not share the effort but wait
    for its end, and then try again. So do those who find an effort that was abandoned and is still ending.
    """

    def __init__(self) -> None:
        self._flights: dict[str, _Flight[T]] = {}

    def __contains__(self, key: object) -> bool:
        """Whether an effort is under way under a key."""
        return key in self._flights

    def __len__(self) -> int:
        return len(self._flights)

    async def join(
        self, key: str, tag: str, start: Start[T], listener: ProgressListener = NO_LISTENER
    ) -> tuple[T, bool]:
        """The result of the effort under `key`, and whether it was shared with one that was under way already.

        `start` is given the audience it is to tell of how far it is; `listener` is among it while the caller waits.
        Raises what the effort raises. Cancelling one caller leaves the effort to the others.
        """
        while (flight := self._flights.get(key)) is not None and (flight.tag != tag or flight.abandoned):
            await asyncio.wait([flight.task])
        shared = flight is not None
        if flight is None:
            flight = self._take_off(key, tag, start)
        flight.passengers += 1
        flight.audience.add(listener)
        try:
            return await asyncio.shield(flight.task), shared
        finally:
            flight.audience.remove(listener)
            flight.passengers -= 1
            if flight.passengers == 0 and not flight.task.done():
                flight.abandoned = True
                flight.task.cancel()

    def _take_off(self, key: str, tag: str, start: Start[T]) -> _Flight[T]:
        audience = ProgressBroadcaster()
        flight = _Flight(asyncio.create_task(start(audience)), tag, audience)
        self._flights[key] = flight
        flight.task.add_done_callback(lambda task: self._arrived(key, flight, task))
        return flight

    def _arrived(self, key: str, flight: _Flight[T], task: asyncio.Task[T]) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]
        if not task.cancelled():
            task.exception()  # marks it as seen: every passenger may have left before it failed
