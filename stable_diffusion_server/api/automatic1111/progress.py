"""Tracks the running requests of each caller of AUTOMATIC1111's API: progress, interrupting, unfinished pictures."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from stable_diffusion_server.imaging import Pixels
from stable_diffusion_server.types import Caller, EngineEventKind, GenerationProgress

T = TypeVar("T")

# Minimum characters of a `force_task_id`, so that other anonymous callers cannot guess it.
LEAST_NAME = 16


@dataclass(frozen=True, slots=True)
class UnfinishedImage:
    """A picture of an interrupted request. `compose` makes it, at the output size; `step` of `steps` were done."""

    compose: Callable[[], Pixels]
    step: int
    steps: int


@dataclass(eq=False, slots=True)
class ImageProgress:
    """Progress of one image. `wanted`: its unfinished picture is wanted now; the engine's threads read it."""

    step: int = 0
    steps: int = 0
    started: bool = False
    done: bool = False
    wanted: bool = False
    _work: asyncio.Task[Any] | None = None
    _unfinished: asyncio.Future[UnfinishedImage] | None = None

    @property
    def fraction(self) -> float:
        """The completed fraction, 0 to 1."""
        return 1.0 if self.done else self.step / self.steps if self.steps else 0.0

    def watch(self, progress: GenerationProgress) -> None:
        """Record the progress, and take the unfinished picture if it is there and wanted."""
        self.step, self.steps = progress.step, progress.steps
        self.started = self.started or progress.kind is not EngineEventKind.QUEUED
        if progress.picture is None or not self.wanted or self._unfinished is None or self._unfinished.done():
            return
        self._unfinished.set_result(UnfinishedImage(progress.picture, progress.step, progress.steps))

    async def run(self, work: Coroutine[Any, Any, T]) -> T | UnfinishedImage:
        """Await the work. Returns the unfinished picture, and cancels the work, if the image is stopped before.

        Raises `CancelledError` if the image is stopped before it was started.
        """
        task = asyncio.create_task(work)
        unfinished: asyncio.Future[UnfinishedImage] = asyncio.get_running_loop().create_future()
        self._work, self._unfinished = task, unfinished
        try:
            await asyncio.wait((task, unfinished), return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            task.cancel()
            await asyncio.wait((task,))
            if not task.cancelled() and task.exception() is None:  # it was storing the finished image
                return task.result()
            return unfinished.result()
        finally:
            task.cancel()
            self.done = True

    def stop(self) -> None:
        """Ask for the unfinished picture; cancel the work if it was not started yet."""
        if self.started:
            self.wanted = True
        elif self._work is not None:
            self._work.cancel()


@dataclass(eq=False, slots=True)
class TrackedTask:
    """A running request. `interrupted`: its caller stopped it."""

    name: str
    images: list[ImageProgress]
    began: float = field(default_factory=time.time)
    eta_seconds: float | None = None
    preview: Pixels | None = None
    interrupted: bool = False

    @property
    def fraction(self) -> float:
        """The completed fraction, 0 to 1."""
        return sum(image.fraction for image in self.images) / len(self.images)

    @property
    def current(self) -> ImageProgress:
        """The first image that is not complete, or the last one."""
        return next((image for image in self.images if not image.done), self.images[-1])

    def watch(self, number: int, progress: GenerationProgress) -> None:
        """Record the progress of an image."""
        self.images[number].watch(progress)
        self.eta_seconds = progress.eta_seconds
        if progress.preview is not None:
            self.preview = progress.preview

    async def run(self, number: int, work: Coroutine[Any, Any, T]) -> T | UnfinishedImage | None:
        """Await the work of one image. Returns its result, or its unfinished picture if the image was stopped.

        Returns `None` for an image that was not started when the task was interrupted.
        """
        if self.interrupted:
            work.close()
            self.images[number].done = True
            return None
        try:
            return await self.images[number].run(work)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self.interrupted and not (task and task.cancelling()):
                return None
            raise

    def interrupt(self) -> None:
        """Stop all images: those that were started are answered unfinished, the others are left out."""
        self.interrupted = True
        for image in self.images:
            image.stop()

    def skip(self) -> None:
        """Stop the images that were started; the others follow."""
        for image in self.images:
            if image.started:
                image.stop()


class TaskTracker:
    """The running tasks of all callers; a caller can read and interrupt its own.

    The server cannot distinguish anonymous callers, so they access a task only by a name that is too long to guess.
    """

    def __init__(self) -> None:
        self._running: defaultdict[str, list[TrackedTask]] = defaultdict(list)

    @contextmanager
    def track(self, caller: Caller, name: str, images: int) -> Iterator[TrackedTask]:
        """Track a task while the block runs."""
        task, owner = TrackedTask(name, [ImageProgress() for _ in range(images)]), _owner(caller)
        self._running[owner].append(task)
        try:
            yield task
        finally:
            self._running[owner].remove(task)
            if not self._running[owner]:
                del self._running[owner]

    def of(self, caller: Caller, name: str = "") -> list[TrackedTask]:
        """Return a caller's running tasks, oldest first. With `name`, return only the tasks with that name."""
        if caller.anonymous and len(name) < LEAST_NAME:
            return []
        return [task for task in self._running.get(_owner(caller), ()) if not name or task.name == name]


def _owner(caller: Caller) -> str:
    """Return the key of a caller's tasks. Names of API keys have no space; that of anonymous callers has."""
    return "anonymous " if caller.anonymous else caller.name
