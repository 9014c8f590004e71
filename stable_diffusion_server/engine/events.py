"""Event dispatcher: sends engine events to the observer of all requests and to the watcher of one request."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import structlog
from numpy.typing import NDArray

from stable_diffusion_server.engine.ticket import Ticket
from stable_diffusion_server.types import EngineEvent, EngineEventKind

_log = structlog.get_logger(__name__)


class EventDispatcher:
    """Builds events and sends them. One thread at a time calls `observe`; its errors are only logged."""

    def __init__(self, observe: Callable[[EngineEvent], None]) -> None:
        self._observe = observe
        self._lock = threading.RLock()

    def dispatch(
        self,
        kind: EngineEventKind,
        ticket: Ticket[Any],
        state: Any = None,
        *,
        position: int = 0,
        eta_seconds: float | None = None,
        preview: NDArray[np.uint8] | None = None,
        picture: Any = None,
        batch_size: int = 1,
        cause: str = "",
        loaded: float | None = None,
    ) -> None:
        """Send an event to the observer and to the ticket's watcher; of a load-only ticket, to its watcher only."""
        event = _event(
            kind,
            ticket,
            state,
            position=position,
            eta_seconds=eta_seconds,
            preview=preview,
            picture=picture,
            batch_size=batch_size,
            cause=cause,
            loaded=loaded,
        )
        if not ticket.load_only:
            with self._lock:
                _send(self._observe, event)
        _send(ticket.watch, event)

    def dispatch_position(self, ticket: Ticket[Any], position: int, eta_seconds: float | None) -> None:
        """Send a new queue position to the ticket's watcher only."""
        if position == ticket.reported_position:
            return
        ticket.reported_position = position
        state = ticket.suspended.state if ticket.suspended else None
        event = _event(EngineEventKind.QUEUED, ticket, state, position=position, eta_seconds=eta_seconds)
        _send(ticket.watch, event)


def _event(kind: EngineEventKind, ticket: Ticket[Any], state: Any, **fields: Any) -> EngineEvent:
    index, steps = (state.index, state.steps) if state is not None else (0, ticket.request.num_inference_steps)
    return EngineEvent(kind, ticket.id, index, steps, time.perf_counter() - ticket.accepted_at, **fields)


def _send(receive: Callable[[EngineEvent], None] | None, event: EngineEvent) -> None:
    try:
        if receive is not None:
            receive(event)
    except Exception as error:  # an observer's error must not fail the request
        _log.warning("an event observer failed", exc_info=error)
