"""A thread that owns states: it seats tickets, steps them together and brings out what they come to."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Generic, TypeVar

import structlog

from stable_diffusion_server.engine.interface import Denoiser, DenoiserCapabilities, EngineState, P, S
from stable_diffusion_server.engine.previews import PreviewScheduler
from stable_diffusion_server.engine.scheduler import Scheduler
from stable_diffusion_server.engine.ticket import RunningRequest, Ticket
from stable_diffusion_server.errors import DeviceLost, NotFinite, OutOfMemory
from stable_diffusion_server.types import DiffusionRequest, EngineEventKind

# A group lets others have the device after so many steps of their waiting; background work after fewer.
TURN, BACKGROUND_TURN = 32, 8
# How often a job is begun anew, after its mates' or the device's failures, before that is its answer.
ATTEMPTS = 10

T = TypeVar("T")

_log = structlog.get_logger(__name__)


class EngineWorker(Generic[S, P]):
    """Draws groups until there is nothing left to do.

    A group takes joins at every step boundary, and its seats leave when they are done, cancelled or failed. When the
    weights are not resident, it has phases instead: all are prepared, stepped until none is left, and finished.
    """

    def __init__(
        self,
        desk: Scheduler[S, P],
        denoiser: Denoiser[S, P],
        abilities: DenoiserCapabilities,
        preparing: threading.Lock,
        lanes: int,
    ) -> None:
        self._desk = desk
        self._denoiser = denoiser
        self._abilities = abilities
        # Tokenizers keep settings inside, so lanes take turns in preparing.
        self._preparing = preparing
        self._lanes = lanes
        # Of a thread that computes all by itself, what other work on the machine takes can be told apart.
        self._cost = time.thread_time if 0 < abilities.cpu_threads < 2 * lanes else time.perf_counter
        self._previews = PreviewScheduler(abilities.preview)
        self._seats: list[RunningRequest[S, P]] = []
        self._contested = 0

    def run(self) -> None:
        """Draw until the engine stops; an end that is none of the jobs' doing is told to all."""
        try:
            if self._lanes > 1:
                self._abilities.enter_worker(self._lanes)
            while self._desk.wait_for_work():
                self._draw_group()
        except BaseException as error:  # no thread, no pictures: say so instead of letting callers wait for ever
            self._desk.shut_down(error, "Drawing has ended unexpectedly; the server has to be restarted.")

    def _draw_group(self) -> None:
        """Draw the first job in the line and all that can join it, until none is left on the device."""
        self._contested, finished = 0, list[RunningRequest[S, P]]()
        resident = self._abilities.resident
        self._admit()
        while self._seats and self._desk.state is not EngineState.FAILED:
            self._step()
            done = [seat for seat in self._seats if seat.state.done]
            self._seats = [seat for seat in self._seats if not seat.state.done]
            for seat in done if resident else ():
                self._finish(seat)
            finished += () if resident else done
            self._seats = [seat for seat in self._seats if not self._desk.abandoned(seat)]
            if resident and self._time_slice_expired():
                self._desk.preempt(self._seats)
                self._seats = []
                return
            if resident:
                self._admit()
        for seat in finished:
            self._finish(seat)
        if not resident:
            self._abilities.release_memory()

    def _time_slice_expired(self) -> bool:
        """Whether others have waited long enough for a device this group is in the way of."""
        first = self._desk.first_waiting()
        if first is None or not self._seats or not self._conflicts_with(first):
            self._contested = 0
            return False
        self._contested += 1
        behind = all(seat.ticket.background for seat in self._seats) and not first.background
        return self._contested >= (BACKGROUND_TURN if behind else TURN)

    def _conflicts_with(self, first: Ticket[P]) -> bool:
        tickets = [seat.ticket for seat in self._seats]
        return (
            first.alone
            or first.request.shape != tickets[0].request.shape
            or first.owner not in {ticket.owner for ticket in tickets}
            or (not first.background and all(ticket.background for ticket in tickets))
        )

    def _admit(self) -> None:
        """Seat those who are next for as long as they fit the group."""
        while (ticket := self._desk.pop_next(self._seats)) is not None:
            seat = ticket.suspended or self._prepared(ticket)
            if seat is not None and not self._desk.abandoned(seat):
                ticket.suspended = None
                self._desk.on_device[ticket] = seat
                self._seats.append(seat)

    def _prepared(self, ticket: Ticket[P]) -> RunningRequest[S, P] | None:
        """The seat of a ticket that begins; none when it failed or has to wait."""
        desk = self._desk
        ticket.attempts += 1
        started = time.perf_counter()
        try:
            with self._preparing:
                state = self._denoiser.prepare(ticket.request)
        except DeviceLost:
            raise
        except OutOfMemory as error:
            self._out_of_memory([ticket], len(self._seats) + 1, error)
            return None
        except Exception as error:  # one job's failure is that job's answer, and no one else's
            desk.fail(ticket, error)
            return None
        now = time.perf_counter()
        timings = {"queue": started - ticket.accepted_at, "prepare": now - started, "denoise": 0.0}
        seat = RunningRequest(ticket, state, timings)
        desk.events.dispatch(
            EngineEventKind.STARTED, ticket, state, eta_seconds=desk.tuner.seconds_for(ticket.request, seat.steps_left)
        )
        return seat

    def _step(self) -> None:
        seats = self._seats
        job = seats[0].ticket.request
        started, spent = time.perf_counter(), self._cost()
        try:
            self._denoiser.step([seat.state for seat in seats])
        except DeviceLost:
            raise
        except OutOfMemory as error:
            self._seats = []
            self._out_of_memory([seat.ticket for seat in seats], len(seats), error)
            return
        except Exception as error:  # whatever a model raises is an answer to a job, never the end of the thread
            self._seats = []
            self._step_failed(seats, error)
            return
        seconds, cost = time.perf_counter() - started, self._cost() - spent
        self._desk.tuner.record_step(job, len(seats), seconds, cost, more_wait=self._desk.more_wait(seats))
        for seat in seats:
            seat.timings["denoise"] += seconds
            seat.attributed_step_seconds += seconds / len(seats)
            seat.batched |= len(seats) > 1
            self._tell_step(seat, len(seats))

    def _tell_step(self, seat: RunningRequest[S, P], size: int) -> None:
        left = self._desk.tuner.seconds_for(seat.ticket.request, seat.steps_left, size)
        preview = self._previews.of(seat)
        self._desk.events.dispatch(
            EngineEventKind.STEP, seat.ticket, seat.state, eta_seconds=left, preview=preview, batch_size=size
        )

    def _step_failed(self, seats: list[RunningRequest[S, P]], error: Exception) -> None:
        """A lone job fails; a group is drawn again one by one, since a job is a value and one may be the culprit."""
        if len(seats) == 1:
            self._desk.fail(seats[0].ticket, error)
            return
        _log.warning("a step of a group failed; its jobs are drawn one by one", exc_info=error)
        for seat in seats:
            seat.ticket.alone = True
        self._desk.requeue((seat.ticket for seat in seats), error)

    def _out_of_memory(self, tickets: list[Ticket[P]], size: int, error: OutOfMemory) -> None:
        """Begin anew in groups half as large; one that is alone, with less memory for what is around it."""
        job = tickets[0].request
        self._desk.tuner.record_out_of_memory(job, size)
        self._abilities.release_memory()
        again = size > 1 or self._abilities.shrink()
        _log.warning("out of memory", group=size, again=again, size=f"{job.width}x{job.height}")
        given_up = [ticket for ticket in tickets if not again or ticket.attempts >= ATTEMPTS]
        for ticket in given_up:
            self._desk.fail(ticket, error)
        self._desk.requeue((ticket for ticket in tickets if ticket not in given_up), error)

    def _finish(self, seat: RunningRequest[S, P]) -> None:
        if self._desk.abandoned(seat):
            return
        started = time.perf_counter()
        try:
            product = self._with_less_memory(lambda: self._denoiser.finish(seat.state))
        except DeviceLost:
            raise
        except Exception as error:  # as in _step
            self._desk.fail(seat.ticket, error)
            if self._desk.doubts():
                self._try_without_adapters(seat.ticket.request)
            return
        seat.timings["decode"] = time.perf_counter() - started
        self._desk.succeed(seat, product)

    def _try_without_adapters(self, job: DiffusionRequest) -> None:
        """Draw a job without its adapters, for nobody. Raises `DeviceLost` when that is not finite either."""
        plain = replace(job, loras=(), lora_digests=())
        _log.warning("drawings with adapters are not finite; one without is tried", model=job.model)
        try:
            state = self._denoiser.prepare(plain)
            while not state.done:
                self._denoiser.step([state])
            self._denoiser.finish(state)
        except NotFinite as error:
            raise DeviceLost("The device gives numbers that are not finite, whatever is drawn.") from error
        except DeviceLost:
            raise
        except Exception as error:  # it was for nobody, and tells nothing of numbers
            _log.warning("it could not be drawn without adapters", exc_info=error)

    def _with_less_memory(self, attempt: Callable[[], T]) -> T:
        """Try again with less memory for as long as there is less to be taken: a finished state is not thrown away."""
        released = False
        while True:
            try:
                return attempt()
            except OutOfMemory:
                self._abilities.release_memory()
                if released and not self._abilities.shrink():
                    raise
                released = True
