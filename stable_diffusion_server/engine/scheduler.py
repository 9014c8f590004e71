"""What the lanes share: the line, the phase, who is on the device, what is known of times. Draws nothing itself."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Generic

import structlog

from stable_diffusion_server.engine.batch_tuner import BatchSizeTuner
from stable_diffusion_server.engine.events import EventDispatcher
from stable_diffusion_server.engine.interface import EngineResult, EngineState, P, S
from stable_diffusion_server.engine.request_queue import RequestQueue
from stable_diffusion_server.engine.ticket import RunningRequest, Ticket
from stable_diffusion_server.errors import DeviceLost, ModelLoadError, NotFinite, NotReady, ServerError
from stable_diffusion_server.types import EngineEventKind

# Told of the labels on the device, one a job, and whether one of them has the device for itself.
OccupancyCallback = Callable[[list[str], bool], object]

# So many results in a row that are not finite are no fault of the jobs any more.
SUSPECT_NOT_FINITE = 6

_log = structlog.get_logger(__name__)


class Scheduler(Generic[S, P]):
    """Where lanes get their tickets and bring their failures. Safe from any thread."""

    def __init__(
        self,
        paces: BatchSizeTuner,
        news: EventDispatcher,
        poisoned: Callable[[], object],
        occupied: OccupancyCallback = lambda labels, alone: None,
    ) -> None:
        self.changed = threading.Condition()
        self.queue: RequestQueue[P] = RequestQueue()
        self.tuner = paces
        self.events = news
        self.state = EngineState.STOPPED
        self.reason = "The engine was not started."
        # Tickets on the device, and their seats once they are prepared.
        self.on_device: dict[Ticket[P], RunningRequest[S, P] | None] = {}
        self._poisoned = poisoned
        self._occupied = occupied
        self._not_finite = 0
        self._not_finite_adapted = 0

    def enter(self, phase: EngineState, reason: str) -> None:
        """Begin a phase, and let everyone who waits for one know."""
        with self.changed:
            self.state, self.reason = phase, reason
            self.changed.notify_all()

    def wait_for_work(self) -> bool:
        """Block until a job waits; false when there is nothing left to do."""
        with self.changed:
            self.changed.wait_for(self._something_to_do)
            return len(self.queue) > 0 and self.state is not EngineState.FAILED

    def _something_to_do(self) -> bool:
        if self.state in (EngineState.STOPPED, EngineState.FAILED):
            return (
                self.state is EngineState.FAILED
                or not len(self.queue)
                or not self._is_held_back(self.queue.next_ticket())
            )
        return not self._is_held_back(self.queue.next_ticket())

    def _is_held_back(self, ticket: Ticket[P] | None) -> bool:
        """Whether a ticket may not go on the device now: it, or one that is there, wants the device for itself."""
        alone = ticket is None or ticket.exclusive or any(drawn.exclusive for drawn in self.on_device)
        return ticket is None or (alone and bool(self.on_device))

    def admit(self, ticket: Ticket[P]) -> None:
        """Put a ticket into the line."""
        with self.changed:
            self.queue.add(ticket)
            order = [place.ticket for place in self.queue.in_order()]
            ticket.reported_position = order.index(ticket) + 1
            eta = self.etas()[ticket.reported_position - 1]
            self.events.dispatch(EngineEventKind.QUEUED, ticket, position=ticket.reported_position, eta_seconds=eta)
            self._tell_positions()
            self.changed.notify_all()

    def pop_next(self, seats: list[RunningRequest[S, P]]) -> Ticket[P] | None:
        """Take the ticket that is to be seated with these, or the first one in the line when there are none."""
        with self.changed:
            cap = self.tuner.cap(seats[0].ticket.request) if seats else 1
            ticket = self.queue.find_batch_compatible(seats, cap) if seats else self.queue.next_ticket()
            if ticket is None or self._is_held_back(ticket):
                return None
            self.queue.take(ticket)
            self.on_device[ticket] = ticket.suspended
            self._tell_occupied()
            self._tell_positions()
            return ticket

    def first_waiting(self) -> Ticket[P] | None:
        """Who would be next."""
        with self.changed:
            return self.queue.next_ticket()

    def more_wait(self, seats: list[RunningRequest[S, P]]) -> bool:
        """Whether a larger group could be filled."""
        with self.changed:
            return self.queue.find_batch_compatible(seats, len(seats) + 1) is not None

    def preempt(self, seats: Iterable[RunningRequest[S, P]]) -> None:
        """Let begun jobs wait for their next turn, with all that they have come to."""
        with self.changed:
            for seat in seats:
                if not self.abandoned(seat):
                    seat.ticket.suspended = seat
                    self.leave(seat.ticket)
                    self.queue.add(seat.ticket)
            self.changed.notify_all()

    def requeue(self, tickets: Iterable[Ticket[P]], error: Exception) -> None:
        """Let jobs begin anew after an error, before all others: a job is a value."""
        with self.changed:
            wanted = []
            for ticket in tickets:
                self.leave(ticket)
                ticket.suspended = None
                if not ticket.settled:
                    wanted.append(ticket)
                    self.events.dispatch(EngineEventKind.RESTARTED, ticket, cause=_kind_of(error))
                elif ticket.result.cancelled():
                    self.events.dispatch(EngineEventKind.CANCELLED, ticket)
            self.queue.add_again(wanted)
            self.changed.notify_all()

    def leave(self, ticket: Ticket[P]) -> None:
        """A ticket is off the device."""
        with self.changed:
            if ticket in self.on_device:
                del self.on_device[ticket]
                self._tell_occupied()
                self.changed.notify_all()  # one that wants the device for itself may wait for this

    def abandoned(self, seat: RunningRequest[S, P]) -> bool:
        """Whether nobody waits for a seat's ticket any more; then it has left."""
        if seat.ticket.settled:
            self.leave(seat.ticket)
            if seat.ticket.result.cancelled():
                self.events.dispatch(EngineEventKind.CANCELLED, seat.ticket, seat.state)
        return seat.ticket.settled

    def succeed(self, seat: RunningRequest[S, P], product: P) -> None:
        """Answer a job with what it came to."""
        ticket = seat.ticket
        self._not_finite = self._not_finite_adapted = 0
        self.tuner.record_overhead(ticket.request, seat.timings["prepare"] + seat.timings["decode"])
        self.leave(ticket)
        if ticket.succeed(EngineResult(product, seat.timings, seat.batched, ticket.attempts)):
            self.events.dispatch(EngineEventKind.DONE, ticket, seat.state)
        elif ticket.result.cancelled():
            self.events.dispatch(EngineEventKind.CANCELLED, ticket, seat.state)

    def forget(self, ticket: Ticket[P]) -> None:
        """Free the place of a cancelled ticket in the line; one on the device is dropped by its lane."""
        with self.changed:
            if self.queue.remove(ticket):
                ticket.suspended = None
                self.events.dispatch(EngineEventKind.CANCELLED, ticket)
                self._tell_positions()

    def fail(self, ticket: Ticket[P], error: Exception) -> None:
        """Answer a job with an error. Raises `DeviceLost` when it is one of too many that are not finite.

        With adapters it may be their doing, so such a job does not count; see `doubts`.
        """
        self.leave(ticket)
        if ticket.fail(error):
            self.events.dispatch(EngineEventKind.FAILED, ticket, cause=_kind_of(error))
        elif ticket.result.cancelled():
            self.events.dispatch(EngineEventKind.CANCELLED, ticket)
        if isinstance(error, NotFinite) and ticket.request.loras:
            self._not_finite_adapted += 1
        elif isinstance(error, NotFinite):
            self._not_finite += 1
            if self._not_finite >= SUSPECT_NOT_FINITE:
                raise DeviceLost("The device gives numbers that are not finite, whatever is drawn.") from error

    def doubts(self) -> bool:
        """Whether so many jobs with adapters in a row were not finite that one without is to tell whose fault it is.

        True once for as many.
        """
        if self._not_finite_adapted < SUSPECT_NOT_FINITE:
            return False
        self._not_finite_adapted = 0
        return True

    def fail_all(self, *, running: bool, lost: ServerError | None = None) -> None:
        """Fail what waits and was not begun, and with `running` all the rest: they may be handed in elsewhere.

        With `lost` those on the device are failed with it, since one of them may be why.
        """
        with self.changed:
            waiting = [place.ticket for place in self.queue.in_order() if running or place.ticket.suspended is None]
            for ticket in waiting:
                self.queue.remove(ticket)
            for ticket in [*waiting, *(self.on_device if running else ())]:
                error = lost if lost is not None and ticket in self.on_device else NotReady(self.reason, retry_after=5)
                if ticket.fail(error):
                    self.events.dispatch(EngineEventKind.FAILED, ticket, cause=_kind_of(error))
            if self.state is EngineState.FAILED:
                self.on_device.clear()
                self._tell_occupied()

    def shut_down(self, error: BaseException, reason: str) -> None:
        """No more pictures will come: say so, fail everyone, and have a poisoned process replaced."""
        told = error.detail if isinstance(error, ServerError) else reason
        # Unusable weights are told in a sentence; where the code stood when it met them helps nobody.
        _log.error("the engine has stopped", reason=told, exc_info=None if isinstance(error, ModelLoadError) else error)
        self.enter(EngineState.FAILED, told)
        poisoned = isinstance(error, DeviceLost)
        self.fail_all(running=True, lost=DeviceLost(self.reason, retry_after=5) if poisoned else None)
        if poisoned:
            self._poisoned()

    def etas(self) -> list[float | None]:
        """Seconds until each ticket in the line is drawn, as far as it can be known."""
        seats = [seat for seat in self.on_device.values() if seat is not None]
        return self.tuner.etas((place.ticket for place in self.queue.in_order()), seats)

    def _tell_occupied(self) -> None:
        """Have it written down who is on the device, before anything happens to it there."""
        alone = len(self.on_device) == 1 and all(ticket.exclusive for ticket in self.on_device)
        self._occupied([ticket.label for ticket in self.on_device], alone)

    def _tell_positions(self) -> None:
        """Tell those who watch that they moved in the line."""
        order = [place.ticket for place in self.queue.in_order()]
        moved = [
            number for number, ticket in enumerate(order, 1) if ticket.watch and ticket.reported_position != number
        ]
        etas = self.etas() if moved else []
        for number in moved:
            self.events.dispatch_position(order[number - 1], number, etas[number - 1])


def _kind_of(error: Exception) -> str:
    """The kind of one of our errors; all others are of one kind."""
    return error.kind if isinstance(error, ServerError) else ServerError.kind
