"""Small pictures on the way, for those who asked, and never for more than a small share of a job's time."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from typing import Any

import numpy as np
import structlog
from numpy.typing import NDArray

from stable_diffusion_server.engine.ticket import RunningRequest

# At most every so many steps, and for at most this share of the time spent on steps.
EVERY, SHARE = 2, 0.05
# Prices are remembered for so many shapes.
SHAPES = 64

_log = structlog.get_logger(__name__)


class PreviewScheduler:
    """Asks a denoiser for previews, and keeps count of what they cost."""

    def __init__(self, preview: Callable[[Any], NDArray[np.uint8]] | None) -> None:
        self._preview = preview
        self._seconds: dict[Hashable, float] = {}

    def of(self, seat: RunningRequest[Any, Any]) -> NDArray[np.uint8] | None:
        """A preview of where this seat stands, when one is wanted, due and affordable."""
        state = seat.state
        if self._preview is None or not seat.ticket.wants_previews or state.done:
            return None
        if seat.last_preview_step >= 0 and state.index - seat.last_preview_step < EVERY:
            return None
        try:
            if state.shape not in self._seconds:
                # The first one of a shape may have to make what the others use, so it is not counted.
                self._preview(state)
                if len(self._seconds) >= SHAPES:
                    self._seconds.clear()
                self._seconds[state.shape] = self._made(state)[1]
            if seat.preview_seconds + self._seconds[state.shape] > SHARE * seat.attributed_step_seconds:
                return None
            preview, seconds = self._made(state)
        except Exception as error:  # a preview is optional by nature
            _log.warning("a preview failed", exc_info=error)
            return None
        seat.last_preview_step = state.index
        seat.preview_seconds += seconds
        self._seconds[state.shape] += 0.2 * (seconds - self._seconds[state.shape])
        return preview

    def _made(self, state: Any) -> tuple[NDArray[np.uint8], float]:
        started = time.perf_counter()
        preview = self._preview(state) if self._preview else np.zeros((1, 1, 3), np.uint8)
        return preview, time.perf_counter() - started
