"""Tracks the running requests of each caller of AUTOMATIC1111's API: their progress, and interrupting them."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from stable_diffusion_server.imaging import Pixels
from stable_diffusion_server.types import Caller, EngineEventKind, GenerationProgress

T = TypeVar("T")

# Minimum characters of a `force_task_id`, so that other anonymous callers cannot guess it.
LEAST_NAME = 16


@dataclass(eq=False, slots=True)
class ImageProgress:
    """Progress of one image."""

    step: int = 0
    steps: int = 0
    started: bool = False
    done: bool = False

    @property
    def fraction(self) -> float:
        """The completed fraction, 0 to 1."""
        return 1.0 if self.done else self.step / self.steps if self.steps else 0.0


@dataclass(eq=False, slots=True)
class TrackedTask:
    """A running request. `interrupted`: its caller stopped it."""

    name: str
    images: list[ImageProgress]
    began: float = field(default_factory=time.time)
    eta_seconds: float | None = None
    preview: Pixels | None = None
    interrupted: bool = False
    _work: set[asyncio.Task[Any]] = field(default_factory=set)

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
        image = self.images[number]
        image.step, image.steps = progress.step, progress.steps
        image.started = image.started or progress.kind is not EngineEventKind.QUEUED
        self.eta_seconds = progress.eta_seconds
        if progress.preview is not None:
            self.preview = progress.preview

    async def run(self, number: int, work: Coroutine[Any, Any, T]) -> T | None:
        """Await the work of one image. Returns its result, `None` if the task is interrupted."""
        if self.interrupted:
            work.close()
            return None
        task = asyncio.create_task(work)
        self._work.add(task)
        try:
            return await task
        except asyncio.CancelledError:
            if self.interrupted and task.cancelled():
                return None
            task.cancel()
            raise
        finally:
            self._work.discard(task)
            self.images[number].done = True

    def interrupt(self) -> None:
        """Cancel the images that are not complete."""
        self.interrupted = True
        for task in self._work:
            task.cancel()


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
