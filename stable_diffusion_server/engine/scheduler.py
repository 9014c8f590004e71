"""Scheduler state shared by all workers: request queue, engine state, running requests, step-time estimates."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import Generic

import structlog

from stable_diffusion_server.engine.batch_tuner import BatchSizeTuner, CoreSharing
from stable_diffusion_server.engine.device_health import DeviceHealth
from stable_diffusion_server.engine.events import EventDispatcher
from stable_diffusion_server.engine.interface import DenoiserCapabilities, EngineResult, EngineState, P
from stable_diffusion_server.engine.model_switching import Choice, ModelSwitcher
from stable_diffusion_server.engine.request_queue import RequestQueue
from stable_diffusion_server.engine.ticket import RunningRequest, Ticket
from stable_diffusion_server.errors import DeviceLost, ModelLoadError, NotFinite, NotReady, ServerError
from stable_diffusion_server.types import EngineEventKind

# Arguments: the labels of the requests on the device, and whether one of them uses the device exclusively.
OccupancyCallback = Callable[[list[str], bool], object]

_log = structlog.get_logger(__name__)


class Scheduler(Generic[P]):
    """Gives workers their next requests and settles the results. Thread-safe.

    `state` and `reason` say whether the engine runs and why not. `on_device` maps the tickets on the device to their
    running requests, `None` until prepared; `sharing` divides the cores among the workers, which are known by their
    threads, and `health` counts results that are not finite. The lock of `changed` guards all of them.
    """

    def __init__(
        self,
        tuner: BatchSizeTuner,
        events: EventDispatcher,
        on_device_lost: Callable[[], object],
        on_occupancy: OccupancyCallback = lambda labels, alone: None,
        switch_patience: float = math.inf,
    ) -> None:
        self.changed = threading.Condition()
        self.queue: RequestQueue[P] = RequestQueue()
        self.tuner = tuner
        self.events = events
        self.state = EngineState.STOPPED
        self.reason = "The engine was not started."
        self.on_device: dict[Ticket[P], RunningRequest[P] | None] = {}
        self.switcher: ModelSwitcher[P] = ModelSwitcher(switch_patience)
        self.on_demand = False
        self.sharing = CoreSharing()
        self._unloads: dict[str, list[Future[None]]] = {}
        self._on_device_lost = on_device_lost
        self._on_occupancy = on_occupancy
        self.health = DeviceHealth()

    def use_models(self, models: DenoiserCapabilities, sharing: CoreSharing) -> None:
        """Use the denoiser that holds the models, on cores divided in this way."""
        self.switcher.attach(models)
        self.sharing = sharing
        self.on_demand = models.on_demand

    def enter(self, state: EngineState, reason: str) -> None:
        """Change the engine's state and wake all waiting threads."""
        with self.changed:
            self.state, self.reason = state, reason
            self.changed.notify_all()

    def wait_for_work(self) -> bool:
        """Block until a request can go to the device. Returns false if the worker has to end."""
        with self.changed:
            if self.sharing.rest(threading.get_ident()):
                self.changed.notify_all()  # another worker may wait until it can have all cores
            self.changed.wait_for(self._has_work_or_ends)
            return not self._ends()

    def _ends(self) -> bool:
        return self.state is EngineState.FAILED or (self.state is EngineState.STOPPED and not len(self.queue))

    def _has_work_or_ends(self) -> bool:
        choice = self._choose()
        runs = choice is not None and not self._is_blocked(choice.ticket)
        return self._ends() or runs or self.next_unload() is not None

    def _choose(self) -> Choice[P] | None:
        if self.on_demand:
            entries = [entry for entry in self.queue.in_order() if not self._waits_for_unload(entry.ticket)]
            return self.switcher.choose(entries, self.on_device)
        first = self.queue.next_ticket()
        return None if first is None else Choice(first)

    def _waits_for_unload(self, ticket: Ticket[P]) -> bool:
        """Whether the ticket starts after its model was unloaded; otherwise new ones could put that off for ever."""
        return ticket.request.model in self._unloads and not self.switcher.is_owed(ticket)

    def _is_blocked(self, ticket: Ticket[P]) -> bool:
        """Whether the ticket must wait: it, or a ticket on the device, needs the device or all cores for itself."""
        if self.on_device and (ticket.exclusive or any(running.exclusive for running in self.on_device)):
            return True
        return not self.sharing.may_start(threading.get_ident(), ticket.request)

    def admit(self, ticket: Ticket[P]) -> None:
        """Add a ticket to the queue and report its position."""
        with self.changed:
            self.queue.add(ticket)
            tickets = self.waiting_tickets()
            ticket.reported_position = tickets.index(ticket) + 1
            eta = self.etas()[ticket.reported_position - 1]
            self.events.dispatch(EngineEventKind.QUEUED, ticket, position=ticket.reported_position, eta_seconds=eta)
            self.report_positions()
            self.changed.notify_all()

    def pop_next(self, batch: Sequence[RunningRequest[P]]) -> Ticket[P] | None:
        """Take the next ticket that may join `batch`, for an empty batch the first one; `None` if there is none."""
        with self.changed:
            if batch:
                ticket = self.queue.find_batch_compatible(batch, self.tuner.cap(batch[0].ticket.request))
                if ticket and self.on_demand and not self._may_join(ticket):
                    return None
            else:
                choice = self._choose()
                ticket = None if choice is None or choice.loads else choice.ticket
            if ticket is None or self._is_blocked(ticket):
                return None
            self.sharing.start(threading.get_ident(), ticket.request)
            self.queue.take(ticket)
            self.on_device[ticket] = ticket.suspended
            self.report_occupancy()
            self.report_positions()
            return ticket

    def _may_join(self, ticket: Ticket[P]) -> bool:
        return not self._waits_for_unload(ticket) and self.switcher.may_join(ticket, self.queue.in_order())

    def first_waiting(self) -> Ticket[P] | None:
        """Return the ticket that runs next, or whose model is loaded next; `None` if no ticket can follow now."""
        with self.changed:
            choice = self._choose()
            return None if choice is None else choice.ticket

    def next_load(self) -> str | None:
        """Return the model that has to be loaded now; `None` if there is none."""
        with self.changed:
            choice = self._choose()
            return choice.ticket.request.model if choice is not None and choice.loads else None

    def busy_models(self) -> frozenset[str]:
        """Return the models that must not be unloaded now."""
        with self.changed:
            return self.switcher.busy(self.waiting_tickets(), self.on_device)

    def ask_to_unload(self, model: str) -> Future[None]:
        """Have a model unloaded as soon as no request uses it. The future ends with the error if it stays."""
        with self.changed:
            wanted: Future[None] = Future()
            self._unloads.setdefault(model, []).append(wanted)
            self.changed.notify_all()
            return wanted

    def is_there(self, model: str) -> bool:
        """Whether a model is loaded and nobody wants it unloaded."""
        with self.changed:
            return self.switcher.is_loaded(model) and model not in self._unloads

    def next_unload(self) -> str | None:
        """Return a model that has to be unloaded now; `None` if there is none, or while requests use it."""
        with self.changed:
            busy = self.busy_models() if self._unloads else ()
            return next((model for model in self._unloads if model not in busy), None)

    def unloaded(self, model: str, error: Exception | None = None) -> None:
        """Settle those who asked for the unloading of a model."""
        with self.changed:
            asked = self._unloads.pop(model, [])
        for wanted in asked:
            if wanted.set_running_or_notify_cancel():
                wanted.set_exception(error) if error else wanted.set_result(None)

    def waiting_tickets(self) -> list[Ticket[P]]:
        """Return the queued tickets in the order in which they are taken if no other ticket arrives."""
        return [entry.ticket for entry in self.queue.in_order()]

    def could_grow(self, batch: Sequence[RunningRequest[P]]) -> bool:
        """Whether a waiting request could join if the batch limit were one higher."""
        with self.changed:
            return self.queue.find_batch_compatible(batch, len(batch) + 1) is not None

    def preempt(self, batch: Iterable[RunningRequest[P]]) -> None:
        """Put running requests back into the queue with their progress."""
        with self.changed:
            for running in batch:
                if not self.drop_if_settled(running):
                    running.ticket.suspended = running
                    self.leave(running.ticket)
                    self.queue.add(running.ticket)
            self.changed.notify_all()

    def requeue(self, tickets: Iterable[Ticket[P]], error: Exception) -> None:
        """Restart requests from their first step after an error. They go before all other requests."""
        with self.changed:
            restarted = []
            for ticket in tickets:
                self.leave(ticket)
                ticket.suspended = None
                if not ticket.settled:
                    restarted.append(ticket)
                    self.events.dispatch(EngineEventKind.RESTARTED, ticket, cause=_kind_of(error))
                elif ticket.result.cancelled():
                    self.events.dispatch(EngineEventKind.CANCELLED, ticket)
            self.queue.add_restarted(restarted)
            self.changed.notify_all()

    def leave(self, ticket: Ticket[P]) -> None:
        """Remove a ticket from the tickets on the device."""
        with self.changed:
            if ticket in self.on_device:
                del self.on_device[ticket]
                self.report_occupancy()
                self.changed.notify_all()  # an exclusive request may wait for this

    def drop_if_settled(self, running: RunningRequest[P]) -> bool:
        """Remove a request from the device if it was cancelled or failed meanwhile. Returns whether it was."""
        if running.ticket.settled:
            self.leave(running.ticket)
            if running.ticket.result.cancelled():
                self.events.dispatch(EngineEventKind.CANCELLED, running.ticket, running.state)
        return running.ticket.settled

    def succeed(self, running: RunningRequest[P], product: P) -> None:
        """Settle a request with its product."""
        ticket = running.ticket
        if self.health.in_doubt:
            self.health.record_success()
        self.tuner.record_overhead(ticket.request, running.timings["prepare"] + running.timings["decode"])
        self.leave(ticket)
        if ticket.succeed(EngineResult(product, running.timings, running.batched, ticket.attempts)):
            self.events.dispatch(EngineEventKind.DONE, ticket, running.state)
        elif ticket.result.cancelled():
            self.events.dispatch(EngineEventKind.CANCELLED, ticket, running.state)

    def forget(self, ticket: Ticket[P]) -> None:
        """Remove a cancelled ticket from the queue. If it is on the device, its worker drops it."""
        with self.changed:
            if self.queue.remove(ticket):
                ticket.suspended = None
                self.events.dispatch(EngineEventKind.CANCELLED, ticket)
                self.report_positions()

    def fail(self, ticket: Ticket[P], error: Exception) -> None:
        """Settle a request with an error. Raises `DeviceLost` after too many non-finite results in a row."""
        self.leave(ticket)
        if ticket.fail(error):
            self.events.dispatch(EngineEventKind.FAILED, ticket, cause=_kind_of(error))
        elif ticket.result.cancelled():
            self.events.dispatch(EngineEventKind.CANCELLED, ticket)
        if isinstance(error, NotFinite):
            self.health.record_not_finite(error, loras=bool(ticket.request.loras))

    def fail_all(self, *, running: bool, lost: ServerError | None = None) -> None:
        """Fail all requests that were not started, and with `running` also all others, with `NotReady`.

        With `lost`, requests on the device fail with that error, because one of them may be its cause.
        """
        with self.changed:
            waiting = [entry.ticket for entry in self.queue.in_order() if running or entry.ticket.suspended is None]
            for ticket in waiting:
                self.queue.remove(ticket)
            for ticket in [*waiting, *(self.on_device if running else ())]:
                error = lost if lost is not None and ticket in self.on_device else NotReady(self.reason, retry_after=5)
                if ticket.fail(error):
                    self.events.dispatch(EngineEventKind.FAILED, ticket, cause=_kind_of(error))
            for model in [*self._unloads]:
                self.unloaded(model, NotReady(self.reason, retry_after=5))
            if self.state is EngineState.FAILED:
                self.on_device.clear()
                self.report_occupancy()

    def shut_down(self, error: BaseException, reason: str) -> None:
        """Enter `FAILED`, fail all requests, and call `on_device_lost` if a new process is needed."""
        sentence = error.detail if isinstance(error, ServerError) else reason
        # A ModelLoadError is a complete sentence for the operator; its traceback adds nothing.
        traceback = None if isinstance(error, ModelLoadError) else error
        _log.error("the engine has stopped", reason=sentence, exc_info=traceback)
        self.enter(EngineState.FAILED, sentence)
        device_lost = isinstance(error, DeviceLost)
        self.fail_all(running=True, lost=DeviceLost(self.reason, retry_after=5) if device_lost else None)
        if device_lost:
            self._on_device_lost()

    def etas(self) -> list[float | None]:
        """Return the seconds until each waiting ticket is done, in queue order; `None` where unknown."""
        running = [running for running in self.on_device.values() if running is not None]
        waiting = self.waiting_tickets()
        etas = self.tuner.etas(waiting, running)
        return self.switcher.with_loads(waiting, etas) if self.on_demand else etas

    def report_occupancy(self, loading: Sequence[Ticket[P]] = ()) -> None:
        """Record which requests are on the device before they run, so that a crash can be attributed to them.

        Those that a model is loaded for count too.
        """
        tickets = [*self.on_device, *loading]
        exclusive = len(tickets) == 1 and all(ticket.exclusive for ticket in tickets)
        self._on_occupancy([ticket.label for ticket in tickets], exclusive)

    def report_positions(self) -> None:
        """Send new queue positions to the watchers of waiting tickets."""
        tickets = self.waiting_tickets()
        moved = [at for at, ticket in enumerate(tickets, 1) if ticket.watch and ticket.reported_position != at]
        etas = self.etas() if moved else []
        for at in moved:
            self.events.dispatch_position(tickets[at - 1], at, etas[at - 1])


def _kind_of(error: Exception) -> str:
    """Return the `kind` of a `ServerError`; the generic kind for any other exception."""
    return error.kind if isinstance(error, ServerError) else ServerError.kind
