"""A submitted request (its future and options), and a request that runs on the device."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Generic
from uuid import uuid4

from stable_diffusion_server.engine.interface import EngineResult, P
from stable_diffusion_server.types import DiffusionRequest, EngineEvent, Task


def request_to_load(model: str) -> DiffusionRequest:
    """Return the request of a load-only ticket: no step of the model."""
    return DiffusionRequest(Task.TEXT_TO_IMAGE, model, "", "", None, 0, 0, 0, 0, 0.0, "")


@dataclass(eq=False, slots=True)
class Ticket(Generic[P]):
    """A submitted request. `result.cancel()` removes it from the queue, or from the device at the next step.

    `owner` is the unit of fairness. `background` requests run after all others. `watch` receives the events of this
    request, with previews while `wants_previews` is true, and once with its unfinished picture when `wants_picture`,
    which is called on the engine's threads, returns true. An `alone` request never shares a forward pass; an
    `exclusive` request never shares the device. `suspended` holds the progress of a preempted request; `attempts`
    counts how often it was started. `label` names it in the crash record. A `load_only` ticket wants no image: it is
    done as soon as the model of its request is loaded.
    """

    request: DiffusionRequest
    id: str = field(default_factory=lambda: uuid4().hex)
    result: Future[EngineResult[P]] = field(default_factory=Future)
    accepted_at: float = field(default_factory=time.perf_counter)
    owner: str = ""
    background: bool = False
    wants_previews: bool = False
    watch: Callable[[EngineEvent], None] | None = None
    wants_picture: Callable[[], bool] | None = None
    alone: bool = False
    exclusive: bool = False
    label: str = ""
    load_only: bool = False
    suspended: RunningRequest[P] | None = None
    attempts: int = 0
    queued_at: float = field(default_factory=time.perf_counter)
    reported_position: int = -1
    _claimed: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def cost(self) -> float:
        """Cost for fair queueing, in steps × pixels. 0 after the start, so that an owner pays for a request once."""
        request = self.request
        return 0.0 if self.attempts else float(request.num_inference_steps * request.width * request.height)

    @property
    def steps_left(self) -> int:
        """Remaining steps; an estimate until the request is prepared."""
        return self.request.num_inference_steps if self.suspended is None else self.suspended.steps_left

    @property
    def settled(self) -> bool:
        """Whether the request has a result or an error, or was cancelled."""
        return self._claimed or self.result.done()

    def succeed(self, result: EngineResult[P]) -> bool:
        """Set the result. Returns false if the request was already settled."""
        if claimed := self._claim():
            self.result.set_result(result)
        return claimed

    def fail(self, error: BaseException) -> bool:
        """Set an error as the result. Returns false if the request was already settled."""
        if claimed := self._claim():
            self.result.set_exception(error)
        return claimed

    def _claim(self) -> bool:
        with self._lock:
            if self._claimed or not self.result.set_running_or_notify_cancel():
                return False
            self._claimed = True
            return True


@dataclass(eq=False, slots=True)
class RunningRequest(Generic[P]):
    """A request on the device, with seconds per stage so far.

    `attributed_step_seconds` is its share of the step time of its batches, `preview_seconds` the time of its previews.
    `pictured`: the unfinished picture was sent, and is decoded again only if it is wanted again.
    """

    ticket: Ticket[P]
    state: Any
    timings: dict[str, float]
    batched: bool = False
    attributed_step_seconds: float = 0.0
    preview_seconds: float = 0.0
    last_preview_step: int = -1
    pictured: bool = False

    @property
    def steps_left(self) -> int:
        """Remaining steps."""
        return int(self.state.steps - self.state.index)
