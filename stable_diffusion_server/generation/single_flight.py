"""Request coalescing (single flight): equal requests share one task, and its progress goes to all of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Protocol, TypeVar

from stable_diffusion_server.types import GenerationProgress

T = TypeVar("T")


class ProgressListener(Protocol):
    """Receiver of progress reports."""

    @property
    def wants_previews(self) -> bool:
        """Whether the listener wants previews."""

    @property
    def wants_picture(self) -> bool:
        """Whether the listener wants the unfinished picture. Read on the engine's threads."""

    def on_progress(self, progress: GenerationProgress) -> None:
        """Receive a progress report, on the event loop."""


@dataclass(frozen=True, slots=True, eq=False)
class CallbackListener:
    """A listener that calls a function. `previews` and `picture` may be functions, which are called at each step."""

    watch: Callable[[GenerationProgress], None]
    previews: bool | Callable[[], bool] = False
    picture: bool | Callable[[], bool] = False

    @property
    def wants_previews(self) -> bool:
        """Whether the listener wants previews now."""
        return self.previews() if callable(self.previews) else self.previews

    @property
    def wants_picture(self) -> bool:
        """Whether the listener wants the unfinished picture now."""
        return self.picture() if callable(self.picture) else self.picture

    def on_progress(self, progress: GenerationProgress) -> None:
        """Call the function."""
        self.watch(progress)


NO_LISTENER = CallbackListener(lambda progress: None)


@dataclass(slots=True, eq=False)
class ProgressBroadcaster:
    """Sends progress reports to all listeners of a task. It is a listener itself, so tasks can be nested.

    A listener that is added later receives the latest report at once.
    """

    _listeners: list[ProgressListener] = field(default_factory=list)
    _latest: GenerationProgress | None = None

    @property
    def wants_previews(self) -> bool:
        """Whether any listener wants previews."""
        return any(listener.wants_previews for listener in self._listeners)

    @property
    def wants_picture(self) -> bool:
        """Whether any listener wants the unfinished picture. Read on the engine's threads, hence the copy."""
        return any(listener.wants_picture for listener in tuple(self._listeners))

    def on_progress(self, progress: GenerationProgress) -> None:
        """Send a report to all listeners. An unfinished picture goes only to those that want it now.

        For the others the generation goes on; to them it would look like an answer to an order of their own.
        """
        self._latest = replace(progress, picture=None)
        for listener in tuple(self._listeners):
            listener.on_progress(progress if listener.wants_picture else self._latest)

    def add(self, listener: ProgressListener) -> None:
        """Add a listener."""
        self._listeners.append(listener)
        if self._latest is not None:
            listener.on_progress(self._latest)

    def remove(self, listener: ProgressListener) -> None:
        """Remove a listener."""
        self._listeners.remove(listener)


Start = Callable[[ProgressBroadcaster], Coroutine[Any, Any, T]]


@dataclass(slots=True)
class _SharedTask(Generic[T]):
    task: asyncio.Task[T]
    tag: str
    broadcaster: ProgressBroadcaster
    callers: int = 0
    abandoned: bool = False


class SingleFlight(Generic[T]):
    """Running tasks by key, for one event loop.

    Callers with the same key and `tag` share a task. A caller with another tag waits until the task ends and then tries
    again. So does a caller that finds a task which all callers left and which is still ending.
    """

    def __init__(self) -> None:
        self._tasks: dict[str, _SharedTask[T]] = {}

    def __contains__(self, key: object) -> bool:
        """Whether a task runs under a key."""
        return key in self._tasks

    def __len__(self) -> int:
        return len(self._tasks)

    async def join(
        self, key: str, tag: str, start: Start[T], listener: ProgressListener = NO_LISTENER
    ) -> tuple[T, bool]:
        """Return the result of the task under `key`, and whether it was already running. Raises the task's errors.

        `start` creates the task; it receives a broadcaster for the progress, which has `listener` added. Cancelling a
        call does not stop the task while other callers wait; when the last caller leaves, the task is cancelled.
        """
        while (shared := self._tasks.get(key)) is not None and (shared.tag != tag or shared.abandoned):
            await asyncio.wait([shared.task])
        joined = shared is not None
        if shared is None:
            shared = self._start(key, tag, start)
        shared.callers += 1
        shared.broadcaster.add(listener)
        try:
            return await asyncio.shield(shared.task), joined
        finally:
            shared.broadcaster.remove(listener)
            shared.callers -= 1
            if shared.callers == 0 and not shared.task.done():
                shared.abandoned = True
                shared.task.cancel()

    def _start(self, key: str, tag: str, start: Start[T]) -> _SharedTask[T]:
        broadcaster = ProgressBroadcaster()
        shared = _SharedTask(asyncio.create_task(start(broadcaster)), tag, broadcaster)
        self._tasks[key] = shared
        shared.task.add_done_callback(lambda task: self._ended(key, shared, task))
        return shared

    def _ended(self, key: str, shared: _SharedTask[T], task: asyncio.Task[T]) -> None:
        if self._tasks.get(key) is shared:
            del self._tasks[key]
        if not task.cancelled():
            task.exception()  # marks the exception as retrieved: all callers may have left before the task failed
