"""Preview scheduler: makes previews of running requests within a small share of their step time."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import structlog
from cachetools import LRUCache
from numpy.typing import NDArray

from stable_diffusion_server.concurrency import moving_average
from stable_diffusion_server.engine.interface import DenoiserCapabilities
from stable_diffusion_server.engine.ticket import RunningRequest

# At most one preview per this many steps, and at most this share of the time spent on steps.
MIN_STEPS_BETWEEN, MAX_TIME_SHARE = 2, 0.05
# Maximum number of shapes with a stored preview time.
MAX_SHAPES = 64

_log = structlog.get_logger(__name__)


class PreviewScheduler:
    """Asks a denoiser for previews and measures how long they take. Used by one thread."""

    def __init__(self, denoiser: DenoiserCapabilities) -> None:
        self._denoiser = denoiser
        self._seconds: LRUCache[Any, float] = LRUCache(MAX_SHAPES)

    def preview_of(self, running: RunningRequest[Any]) -> NDArray[np.uint8] | None:
        """Return a preview, uint8, height × width × 3; `None` if it is not wanted, not due, or too expensive now."""
        state = running.state
        if not running.ticket.wants_previews or state.done:
            return None
        if running.last_preview_step >= 0 and state.index - running.last_preview_step < MIN_STEPS_BETWEEN:
            return None
        try:
            expected = self._expected_seconds(state)
            if (
                expected is None
                or running.preview_seconds + expected > MAX_TIME_SHARE * running.attributed_step_seconds
            ):
                return None
            preview, seconds = self._timed_preview(state)
        except Exception as error:  # a failed preview must not fail the request
            _log.warning("a preview failed", exc_info=error)
            return None
        running.last_preview_step = state.index
        running.preview_seconds += seconds
        self._seconds[state.shape] = moving_average(expected, seconds)
        return preview

    def _expected_seconds(self, state: Any) -> float | None:
        """Return seconds per preview of this shape, measured at the first call; `None` without preview support."""
        seconds = self._seconds.get(state.shape)
        if seconds is None:
            # The first preview of a shape may include one-off setup; exclude it from the timing.
            if self._denoiser.preview(state) is None:
                return None
            seconds = self._seconds[state.shape] = self._timed_preview(state)[1]
        return seconds

    def _timed_preview(self, state: Any) -> tuple[NDArray[np.uint8] | None, float]:
        started = time.perf_counter()
        preview = self._denoiser.preview(state)
        return preview, time.perf_counter() - started
