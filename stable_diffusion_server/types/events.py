"""Events of a request in the engine, and the progress that callers see."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray


class EngineEventKind(StrEnum):
    """States and steps of a request in the engine; `RESTARTED` begins it again after a failure or preemption."""

    QUEUED = "queued"
    STARTED = "started"
    STEP = "step"
    RESTARTED = "again"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class EngineEvent:
    """One event of a request in the engine; the other attributes are those of `GenerationProgress`.

    Attributes:
        seconds: Time since the request was queued.
        batch_size: Number of requests that shared the step.
        cause: The kind of error that the request failed with, or that restarted it.
    """

    kind: EngineEventKind
    job_id: str
    step: int = 0
    steps: int = 0
    seconds: float = 0.0
    position: int = 0
    eta_seconds: float | None = None
    preview: NDArray[np.uint8] | None = field(default=None, compare=False, repr=False)
    batch_size: int = 1
    cause: str = ""


@dataclass(frozen=True, slots=True)
class GenerationProgress:
    """Progress of a request.

    Attributes:
        step: Finished steps, out of `steps`.
        position: Number of requests ahead in the queue; 0 on the device.
        eta_seconds: Estimated seconds until the image is ready, or `None` if unknown.
        preview: Small preview image (uint8, height × width × 3), or `None`.
    """

    kind: EngineEventKind
    step: int = 0
    steps: int = 0
    position: int = 0
    eta_seconds: float | None = None
    preview: NDArray[np.uint8] | None = field(default=None, compare=False, repr=False)
