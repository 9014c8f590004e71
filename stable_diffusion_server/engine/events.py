"""Tells what happens to jobs: to the observer of all of them, and to who watches one. Decides nothing."""

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
    """Makes events and passes them on, one at a time; the faults of those who are told never reach the device."""

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
        batch_size: int = 1,
        cause: str = "",
    ) -> None:
        """Tell everyone of a moment in a job's life."""
        more = {"position": position, "eta_seconds": eta_seconds, "preview": preview}
        event = _event(kind, ticket, state, batch_size=batch_size, cause=cause, **more)
        with self._lock:
            _pass_on(self._observe, event)
        _pass_on(ticket.watch, event)

    def dispatch_position(self, ticket: Ticket[Any], position: int, eta_seconds: float | None) -> None:
        """Tell who watches a waiting job that it moved in the line; for all others that is no news."""
        if position != ticket.reported_position:
            ticket.reported_position = position
            state = ticket.suspended.state if ticket.suspended else None
            _pass_on(
                ticket.watch, _event(EngineEventKind.QUEUED, ticket, state, position=position, eta_seconds=eta_seconds)
            )


def _event(kind: EngineEventKind, ticket: Ticket[Any], state: Any, **more: Any) -> EngineEvent:
    index, steps = (state.index, state.steps) if state is not None else (0, ticket.request.num_inference_steps)
    return EngineEvent(kind, ticket.id, index, steps, time.perf_counter() - ticket.accepted_at, **more)


def _pass_on(told: Callable[[EngineEvent], None] | None, event: EngineEvent) -> None:
    try:
        if told is not None:
            told(event)
    except Exception as error:  # an observer is optional by nature
        _log.warning("an observer failed", exc_info=error)
