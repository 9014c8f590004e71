"""What a caller has under way through AUTOMATIC1111's doors: how far it is, and stopping it. Its own alone."""

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

# Characters of a `force_task_id` that tells an anonymous caller's task from others'.
LEAST_NAME = 16


@dataclass(eq=False, slots=True)
class ImageProgress:
    """One picture on its way."""

    step: int = 0
    steps: int = 0
    started: bool = False
    done: bool = False

    @property
    def share(self) -> float:
        """How much of it is drawn, 0 to 1."""
        return 1.0 if self.done else self.step / self.steps if self.steps else 0.0


@dataclass(eq=False, slots=True)
class TrackedTask:
    """One request under way. `interrupted`: its caller has had enough."""

    name: str
    pictures: list[ImageProgress]
    began: float = field(default_factory=time.time)
    eta_seconds: float | None = None
    preview: Pixels | None = None
    interrupted: bool = False
    _work: set[asyncio.Task[Any]] = field(default_factory=set)

    @property
    def share(self) -> float:
        """How much of it is drawn, 0 to 1."""
        return sum(picture.share for picture in self.pictures) / len(self.pictures)

    @property
    def current(self) -> ImageProgress:
        """The picture that is drawn at the moment, or the last."""
        return next((picture for picture in self.pictures if not picture.done), self.pictures[-1])

    def watch(self, number: int, progress: GenerationProgress) -> None:
        """Take note of how far a picture is."""
        picture = self.pictures[number]
        picture.step, picture.steps = progress.step, progress.steps
        picture.started = picture.started or progress.kind is not EngineEventKind.QUEUED
        self.eta_seconds = progress.eta_seconds
        if progress.preview is not None:
            self.preview = progress.preview

    async def drawn(self, number: int, work: Coroutine[Any, Any, T]) -> T | None:
        """What the work of a picture comes to, `None` when it was interrupted."""
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
            self.pictures[number].done = True

    def interrupt(self) -> None:
        """Stop what is not done yet."""
        self.interrupted = True
        for task in self._work:
            task.cancel()


class TaskTracker:
    """Everyone's tasks; a caller sees and stops its own.

    Anonymous callers are strangers to one another: theirs are known by their names alone, where those are long enough
    not to be guessed.
    """

    def __init__(self) -> None:
        self._under_way: defaultdict[str, list[TrackedTask]] = defaultdict(list)

    @contextmanager
    def begun(self, caller: Caller, name: str, pictures: int) -> Iterator[TrackedTask]:
        """A task for as long as the block lasts."""
        task, whose = TrackedTask(name, [ImageProgress() for _ in range(pictures)]), _whose(caller)
        self._under_way[whose].append(task)
        try:
            yield task
        finally:
            self._under_way[whose].remove(task)
            if not self._under_way[whose]:
                del self._under_way[whose]

    def of(self, caller: Caller, name: str = "") -> list[TrackedTask]:
        """A caller's tasks under way, the oldest first; those of a name if one is given."""
        if caller.anonymous and len(name) < LEAST_NAME:
            return []
        return [task for task in self._under_way.get(_whose(caller), ()) if not name or task.name == name]


def _whose(caller: Caller) -> str:
    """The name tasks are kept under; no key is named like the one of all anonymous callers."""
    return "anonymous " if caller.anonymous else caller.name
