"""What happens to a request in the engine, and how far it is."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray


class EngineEventKind(StrEnum):
    """Moments in the life of a job on the device."""

    QUEUED = "queued"
    STARTED = "started"
    STEP = "step"
    RESTARTED = "again"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class EngineEvent:
    """One moment in a job's life. `step` counts finished steps out of `steps`; `seconds` since it was queued.

    `batch_size` jobs shared that step. `cause` is the kind of error a job failed with, or is begun anew for (`AGAIN`).
    The rest is as in `GenerationProgress`.
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
    """How far an order is. `position` counts the jobs before it while it waits (0: on the device).

    `eta_seconds` is `None` where unknown; `preview` a small picture, height × width × 3 uint8, or `None`.
    """

    kind: EngineEventKind
    step: int = 0
    steps: int = 0
    position: int = 0
    eta_seconds: float | None = None
    preview: NDArray[np.uint8] | None = field(default=None, compare=False, repr=False)
