"""Single flight: callers who want the same thing share one effort, and the last to leave ends it. Knows no pictures."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T")


@dataclass(slots=True)
class _Flight(Generic[T]):
    task: asyncio.Task[T]
    tag: str
    passengers: int = 0
    abandoned: bool = False


class Flights(Generic[T]):
    """Efforts under way, by key. Lives on one event loop.

    `tag` says what exactly is being done under a key: callers with another tag do not share the effort but wait
    for its end, and then try again. So do those who find an effort that was abandoned and is still ending.
    """

    def __init__(self) -> None:
        self._flights: dict[str, _Flight[T]] = {}

    def __len__(self) -> int:
        return len(self._flights)

    async def join(self, key: str, tag: str, start: Callable[[], Coroutine[Any, Any, T]]) -> tuple[T, bool]:
        """The result of the effort under `key`, and whether it was shared with one that was under way already.

        Raises what the effort raises. Cancelling one caller leaves the effort to the others.
        """
        while (flight := self._flights.get(key)) is not None and (flight.tag != tag or flight.abandoned):
            await asyncio.wait([flight.task])
        shared = flight is not None
        if flight is None:
            flight = self._take_off(key, tag, start)
        flight.passengers += 1
        try:
            return await asyncio.shield(flight.task), shared
        finally:
            flight.passengers -= 1
            if flight.passengers == 0 and not flight.task.done():
                flight.abandoned = True
                flight.task.cancel()

    def _take_off(self, key: str, tag: str, start: Callable[[], Coroutine[Any, Any, T]]) -> _Flight[T]:
        flight = _Flight(asyncio.create_task(start()), tag)
        self._flights[key] = flight
        flight.task.add_done_callback(lambda task: self._arrived(key, flight, task))
        return flight

    def _arrived(self, key: str, flight: _Flight[T], task: asyncio.Task[T]) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]
        if not task.cancelled():
            task.exception()  # marks it as seen: every passenger may have left before it failed
