"""Model switching: decides which request runs next, and when a model that is not in memory is loaded for one."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic

from stable_diffusion_server.engine.interface import DenoiserCapabilities, P
from stable_diffusion_server.engine.request_queue import QueueEntry
from stable_diffusion_server.engine.ticket import Ticket


@dataclass(frozen=True, slots=True)
class Choice(Generic[P]):
    """The next ticket; with `loads`, its model has to be loaded first."""

    ticket: Ticket[P]
    loads: bool = False


class ModelSwitcher(Generic[P]):
    """Drains the requests of loaded models before it loads another one, but lets nobody wait for that for long.

    A request whose model is not loaded is overdue after `patience` seconds. Then no request that came after a load
    joins any more, and the model of the oldest overdue request is loaded as soon as there is room. A load serves all
    requests that wait for the model at that moment: they are owed, and the model is not unloaded before they are done.
    So an overdue request waits for at most one load, and the owed requests, of each other model. This is gated service
    of the queues (Takagi 1988, ACM Computing Surveys 20(1)). Not thread-safe; the scheduler holds the lock.
    """

    def __init__(self, patience: float, clock: Callable[[], float] = time.perf_counter) -> None:
        self._patience = patience
        self._clock = clock
        self._models: DenoiserCapabilities | None = None
        self._owed: dict[str, list[Ticket[P]]] = {}
        self._load_seconds: dict[str, float] = {}

    def attach(self, models: DenoiserCapabilities) -> None:
        """Use the denoiser that holds the models."""
        self._models = models

    def is_loaded(self, model: str) -> bool:
        """Whether a request of the model can start at once."""
        return self._models is None or self._models.is_loaded(model)

    def choose(self, entries: Sequence[QueueEntry[P]], on_device: Collection[Ticket[P]]) -> Choice[P] | None:
        """Return what runs next; `None` if the queue is empty, or until a running request has ended."""
        if not entries or self._models is None:
            return Choice(entries[0].ticket) if entries else None
        waiting = [entry.ticket for entry in entries]
        absent = [ticket for ticket in waiting if not self._models.is_loaded(ticket.request.model)]
        if not absent:
            return Choice(waiting[0])
        busy = self.busy(waiting, on_device)
        if overdue := self._overdue(absent):
            loadable = self._first_with_room(overdue, busy)
            return Choice(loadable, True) if loadable else self._first_owed(waiting)
        if waiting[0] is absent[0] and self._models.has_room_for(waiting[0].request.model, None):
            return Choice(waiting[0], True)
        if len(absent) < len(waiting):
            return Choice(next(ticket for ticket in waiting if ticket not in absent))
        loadable = self._first_with_room(absent, busy)
        return Choice(loadable, True) if loadable else None

    def may_join(self, ticket: Ticket[P], entries: Sequence[QueueEntry[P]]) -> bool:
        """Whether a ticket may join a running batch: while a request is overdue, only what is owed may."""
        if self.is_owed(ticket):
            return True
        return not self._overdue(entry.ticket for entry in entries if not self.is_loaded(entry.ticket.request.model))

    def busy(self, waiting: Iterable[Ticket[P]], on_device: Iterable[Ticket[P]]) -> frozenset[str]:
        """Return the models that must stay: on the device, of parked requests, and of owed ones."""
        parked = {ticket.request.model for ticket in waiting if ticket.suspended is not None}
        return frozenset({*parked, *(ticket.request.model for ticket in on_device), *self._models_owed()})

    def loaded(self, model: str, waiting: Iterable[Ticket[P]], seconds: float) -> None:
        """Record that a model was loaded for the tickets that wait for it, and what that took."""
        self._owed[model] = [ticket for ticket in waiting if ticket.request.model == model]
        self._load_seconds[model] = seconds

    def with_loads(self, waiting: Iterable[Ticket[P]], etas: Iterable[float | None]) -> list[float | None]:
        """Add to the estimates of tickets in order the seconds of one load of each model before them, as measured."""
        seconds, models, later = 0.0, set[str](), list[float | None]()
        for ticket, eta in zip(waiting, etas, strict=True):
            model = ticket.request.model
            if model not in models and not self.is_loaded(model):
                seconds += self._load_seconds.get(model, 0.0)
            models.add(model)
            later.append(None if eta is None else eta + seconds)
        return later

    def _overdue(self, absent: Iterable[Ticket[P]]) -> list[Ticket[P]]:
        """Return the tickets that waited too long for their model, the oldest first."""
        now = self._clock()
        late = [ticket for ticket in absent if now - ticket.accepted_at >= self._patience]
        return sorted(late, key=lambda ticket: ticket.accepted_at)

    def _first_with_room(self, tickets: Iterable[Ticket[P]], busy: frozenset[str]) -> Ticket[P] | None:
        models = self._models
        return next((ticket for ticket in tickets if models and models.has_room_for(ticket.request.model, busy)), None)

    def _first_owed(self, waiting: Iterable[Ticket[P]]) -> Choice[P] | None:
        """Return what keeps a model busy: the first ticket that is parked or owed."""
        return next((Choice(ticket) for ticket in waiting if self.is_owed(ticket)), None)

    def is_owed(self, ticket: Ticket[P]) -> bool:
        """Whether a model stays until this ticket is done: it is parked, or the model was loaded for it."""
        return ticket.suspended is not None or ticket in self._owed.get(ticket.request.model, ())

    def _models_owed(self) -> set[str]:
        unsettled = {model: [ticket for ticket in owed if not ticket.settled] for model, owed in self._owed.items()}
        self._owed = {model: owed for model, owed in unsettled.items() if owed}
        return set(self._owed)
