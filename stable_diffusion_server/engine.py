"""The thread that owns the device: bounded queue, step loop, batching, cancelling. Knows no diffusion."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Generic, Protocol, TypeVar
from uuid import uuid4

import structlog

from stable_diffusion_server.errors import Busy, NotReady, ServerError
from stable_diffusion_server.orders import Event, EventKind, Job

S = TypeVar("S", bound="Steppable")
P = TypeVar("P")
P_co = TypeVar("P_co", covariant=True)

_log = structlog.get_logger(__name__)


class Steppable(Protocol):
    """A job between two steps, as far as the engine has to know it."""

    index: int

    @property
    def shape(self) -> Hashable:
        """What must be equal to share a forward pass."""

    @property
    def steps(self) -> int:
        """Steps in all."""

    @property
    def done(self) -> bool:
        """Whether no step is left."""


class Denoiser(Protocol[S, P_co]):
    """What the engine is given to draw with. Called from the engine's own thread alone."""

    def prepare(self, job: Job) -> S:
        """The job's state before its first step."""

    def step(self, states: Sequence[S]) -> None:
        """One step for every state; they share a shape."""

    def finish(self, state: S) -> P_co:
        """What a state that is done comes to."""


class Phase(StrEnum):
    """Where the engine is in its own life."""

    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class Drawing(Generic[P]):
    """What came out of a job: the product, seconds spent per stage, and whether it shared forward passes."""

    product: P
    timings: dict[str, float]
    batched: bool


@dataclass(eq=False, slots=True)
class Ticket(Generic[P]):
    """A job that was accepted. `result.cancel()` takes it out of the queue, or off the device at the next step."""

    job: Job
    id: str = field(default_factory=lambda: uuid4().hex)
    result: Future[Drawing[P]] = field(default_factory=Future)
    accepted_at: float = field(default_factory=time.perf_counter)
    alone: bool = False
    owner: str = ""
    background: bool = False
    wants_previews: bool = False
    watch: Callable[[Event], None] | None = None


@dataclass(eq=False, slots=True)
class _Seat(Generic[S, P]):
    """A ticket on the device."""

    ticket: Ticket[P]
    state: S
    timings: dict[str, float]
    batched: bool = False


class Engine(Generic[S, P]):
    """Draws jobs in order of arrival; jobs of one shape join the running group at a step boundary.

    Nothing joins once a job of another shape is the oldest one waiting, so no shape can starve another.
    """

    def __init__(
        self,
        load: Callable[[], Denoiser[S, P]],
        *,
        queue_limit: int,
        max_batch: int,
        observe: Callable[[Event], None] = lambda event: None,
        ready: Callable[[], object] = lambda: None,
    ) -> None:
        self._load = load
        self._queue_limit = queue_limit
        self._max_batch = max_batch
        self._observe = observe
        self._ready = ready
        self._waiting: deque[Ticket[P]] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._seconds_per_job = 1.0
        self._running = 0
        self.phase = Phase.STOPPED
        self.reason = "The engine was not started."

    @property
    def waiting(self) -> int:
        """Jobs accepted and not yet on the device."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Jobs on the device."""
        return self._running

    def start(self) -> None:
        """Start the device thread, which loads the models first. Returns at once."""
        self.phase, self.reason = Phase.LOADING, "The models are loading."
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def drain(self) -> None:
        """Take no more work and fail what waits; what is on the device goes on to its end."""
        with self._changed:
            self.phase, self.reason = Phase.STOPPED, "The server is going down."
            self._fail_waiting()
            self._changed.notify_all()

    def stop(self, grace: float) -> None:
        """Drain, and give what is on the device `grace` seconds to end."""
        self.drain()
        if self._thread is not None:
            self._thread.join(grace)

    def check_open(self) -> None:
        """Raise `NotReady` until the models are loaded, `Busy` while the queue is full, as `submit` would."""
        with self._changed:
            if self.phase is not Phase.READY:
                raise NotReady(self.reason, retry_after=5)
            if len(self._waiting) >= self._queue_limit:
                wait = math.ceil(self._seconds_per_job * (len(self._waiting) + self._running) / self._max_batch)
                raise Busy(f"{len(self._waiting)} pictures are waiting already.", retry_after=max(1, wait))

    def submit(
        self,
        job: Job,
        *,
        owner: str = "",
        background: bool = False,
        previews: bool = False,
        watch: Callable[[Event], None] | None = None,
    ) -> Ticket[P]:
        """Accept a job. Raises `NotReady` until the models are loaded, `Busy` when the queue is full.

        `watch` is told of the job's events, on whichever thread they happen.
        """
        with self._changed:
            self.check_open()
            ticket: Ticket[P] = Ticket(job, owner=owner, background=background, wants_previews=previews, watch=watch)
            self._waiting.append(ticket)
            self._changed.notify_all()
        ticket.result.add_done_callback(lambda result: self._forget(ticket) if result.cancelled() else None)
        self._tell(EventKind.QUEUED, ticket)
        return ticket

    def _forget(self, ticket: Ticket[P]) -> None:
        """Free the place of a cancelled ticket in the queue; one on the device is dropped by the step loop."""
        with self._changed:
            if ticket in self._waiting:
                self._waiting.remove(ticket)
                self._tell(EventKind.CANCELLED, ticket)

    def _fail_waiting(self) -> None:
        while self._waiting:
            ticket = self._waiting.popleft()
            if ticket.result.set_running_or_notify_cancel():
                ticket.result.set_exception(NotReady(self.reason, retry_after=5))

    def _run(self) -> None:
        try:
            denoiser = self._load()
        except BaseException as error:  # whatever it is, /readyz has to say that no model will come
            self._give_up(error, "The models could not be loaded.")
            return
        with self._changed:
            if self.phase is Phase.LOADING:
                self.phase, self.reason = Phase.READY, ""
        self._ready()
        try:
            while self._wait_for_work():
                self._draw_group(denoiser)
        except BaseException as error:  # no thread, no pictures: say so instead of letting callers wait for ever
            self._give_up(error, "Drawing has ended unexpectedly; the server has to be restarted.")

    def _give_up(self, error: BaseException, reason: str) -> None:
        _log.error("the engine has stopped", exc_info=error)
        with self._changed:
            self.phase = Phase.FAILED
            self.reason = error.detail if isinstance(error, ServerError) else reason
            self._fail_waiting()

    def _wait_for_work(self) -> bool:
        """Block until a job waits; false when the engine was stopped."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self.phase is Phase.STOPPED)
            return self.phase is not Phase.STOPPED

    def _draw_group(self, denoiser: Denoiser[S, P]) -> None:
        """Draw the oldest job and all that can join it, until none is left on the device."""
        seats: list[_Seat[S, P]] = []
        while True:
            seats = [seat for seat in seats if not self._abandoned(seat)]
            self._admit(denoiser, seats)
            self._running = len(seats)
            if not seats:
                return
            self._step(denoiser, seats)
            for seat in [seat for seat in seats if seat.state.done]:
                seats.remove(seat)
                self._finish(denoiser, seat)

    def _abandoned(self, seat: _Seat[S, P]) -> bool:
        gone = seat.ticket.result.cancelled()
        if gone:
            self._tell(EventKind.CANCELLED, seat.ticket, seat.state)
        return gone

    def _admit(self, denoiser: Denoiser[S, P], seats: list[_Seat[S, P]]) -> None:
        """Seat the oldest waiting jobs for as long as they fit the group on the device."""
        while (ticket := self._next_fitting(seats)) is not None:
            started = time.perf_counter()
            try:
                state = denoiser.prepare(ticket.job)
            except Exception as error:  # one job's failure is that job's answer, and no one else's
                self._fail(ticket, error)
                continue
            timings = {
                "queue": started - ticket.accepted_at,
                "prepare": time.perf_counter() - started,
                "denoise": 0.0,
            }
            seats.append(_Seat(ticket, state, timings))
            self._tell(EventKind.STARTED, ticket, state)

    def _next_fitting(self, seats: list[_Seat[S, P]]) -> Ticket[P] | None:
        with self._changed:
            if not self._waiting or len(seats) >= self._max_batch:
                return None
            oldest = self._waiting[0]
            if seats and (oldest.alone or seats[0].ticket.alone or oldest.job.shape != seats[0].ticket.job.shape):
                return None
            return self._waiting.popleft()

    def _step(self, denoiser: Denoiser[S, P], seats: list[_Seat[S, P]]) -> None:
        started = time.perf_counter()
        try:
            denoiser.step([seat.state for seat in seats])
        except Exception as error:  # whatever a model raises is an answer to a job, never the end of the thread
            self._step_failed(seats, error)
            return
        seconds = time.perf_counter() - started
        for seat in seats:
            seat.timings["denoise"] += seconds
            seat.batched |= len(seats) > 1
            self._tell(EventKind.STEP, seat.ticket, seat.state)

    def _step_failed(self, seats: list[_Seat[S, P]], error: Exception) -> None:
        """A lone job fails; a group is drawn again one by one, since a job is a value and one may be the culprit."""
        if len(seats) == 1:
            self._fail(seats[0].ticket, error)
        else:
            _log.warning("a step of a group failed; its jobs are drawn one by one", exc_info=error)
            with self._changed:
                for seat in reversed(seats):
                    seat.ticket.alone = True
                    self._waiting.appendleft(seat.ticket)
        seats.clear()

    def _finish(self, denoiser: Denoiser[S, P], seat: _Seat[S, P]) -> None:
        ticket = seat.ticket
        if self._abandoned(seat):
            return
        started = time.perf_counter()
        try:
            product = denoiser.finish(seat.state)
        except Exception as error:  # as in _step
            self._fail(ticket, error)
            return
        seat.timings["decode"] = time.perf_counter() - started
        busy = sum(seconds for stage, seconds in seat.timings.items() if stage != "queue")
        self._seconds_per_job = 0.8 * self._seconds_per_job + 0.2 * busy
        if ticket.result.set_running_or_notify_cancel():
            ticket.result.set_result(Drawing(product, seat.timings, seat.batched))
            self._tell(EventKind.DONE, ticket, seat.state)
        else:
            self._tell(EventKind.CANCELLED, ticket, seat.state)

    def _fail(self, ticket: Ticket[P], error: Exception) -> None:
        if ticket.result.set_running_or_notify_cancel():
            ticket.result.set_exception(error)
        self._tell(EventKind.FAILED, ticket)

    def _tell(self, kind: EventKind, ticket: Ticket[P], state: Any = None) -> None:
        """Tell the observer, whose own faults must not reach the device."""
        index, steps = (state.index, state.steps) if state is not None else (0, ticket.job.num_inference_steps)
        event = Event(kind, ticket.id, index, steps, time.perf_counter() - ticket.accepted_at)
        try:
            self._observe(event)
            if ticket.watch is not None:
                ticket.watch(event)
        except Exception as error:  # an observer is optional by nature
            _log.warning("an observer failed", exc_info=error)
