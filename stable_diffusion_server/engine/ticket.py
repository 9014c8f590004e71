"""A job that was accepted, and its seat on the device. Knows how it is settled, and not by whom."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Generic
from uuid import uuid4

from stable_diffusion_server.engine.interface import EngineResult, P, S
from stable_diffusion_server.types import DiffusionRequest, EngineEvent


@dataclass(eq=False, slots=True)
class Ticket(Generic[P]):
    """A job that was accepted. `result.cancel()` takes it out of the line, or off the device at the next step.

    `owner` is who shares with others in turns; `background` work lets all other go first. `watch` is told of its
    events, with previews while `wants_previews`. `alone`: it shares no forward pass any more; `exclusive`: nothing
    else is on the device while it is. `seat` is kept while a job that was begun waits for its next turn, `attempts`
    counts how often it was begun. `label` is what the record of the device names it by.
    """

    request: DiffusionRequest
    id: str = field(default_factory=lambda: uuid4().hex)
    result: Future[EngineResult[P]] = field(default_factory=Future)
    accepted_at: float = field(default_factory=time.perf_counter)
    owner: str = ""
    background: bool = False
    wants_previews: bool = False
    watch: Callable[[EngineEvent], None] | None = None
    alone: bool = False
    exclusive: bool = False
    label: str = ""
    suspended: RunningRequest[Any, P] | None = None
    attempts: int = 0
    queued_at: float = field(default_factory=time.perf_counter)
    reported_position: int = -1
    _claimed: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def cost(self) -> float:
        """Its share of the device in steps × pixels, which is what owners take turns by; paid once."""
        return (
            0.0 if self.attempts else float(self.request.num_inference_steps * self.request.width * self.request.height)
        )

    @property
    def steps_left(self) -> int:
        """Steps it has still to take, as far as is known before it is prepared."""
        return self.request.num_inference_steps if self.suspended is None else self.suspended.steps_left

    @property
    def settled(self) -> bool:
        """Whether its result is there, or nobody wants it any more."""
        return self._claimed or self.result.done()

    def succeed(self, drawing: EngineResult[P]) -> bool:
        """Give the result; false when it was settled or cancelled before."""
        if claimed := self._claim():
            self.result.set_result(drawing)
        return claimed

    def fail(self, error: BaseException) -> bool:
        """Give an error for the result; false when it was settled or cancelled before."""
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
class RunningRequest(Generic[S, P]):
    """A ticket on the device, and what it has cost so far in seconds by stage.

    `share` is its part of the seconds its groups took for their steps, and `previews` what was spent on those.
    """

    ticket: Ticket[P]
    state: S
    timings: dict[str, float]
    batched: bool = False
    attributed_step_seconds: float = 0.0
    preview_seconds: float = 0.0
    last_preview_step: int = -1

    @property
    def steps_left(self) -> int:
        """Steps it has still to take."""
        return self.state.steps - self.state.index
