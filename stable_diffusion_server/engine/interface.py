"""Types between the engine and a denoiser: the denoiser's protocol, its state, the engine's state and result."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from stable_diffusion_server.types import DiffusionRequest

S = TypeVar("S", bound="DenoisingState")
P = TypeVar("P")
P_co = TypeVar("P_co", covariant=True)


class LoadStopped(BaseException):  # no handler of errors may take it for one
    """Nobody waits for the model any more, so that its load ends."""


class DenoisingState(Protocol):
    """A request between two denoising steps. `index` counts the finished steps."""

    index: int

    @property
    def shape(self) -> Hashable:
        """Key that must be equal for two states to share a forward pass."""

    @property
    def steps(self) -> int:
        """Total number of steps."""

    @property
    def done(self) -> bool:
        """Whether all steps are finished."""


class DenoiserCapabilities(Protocol):
    """Optional abilities of a denoiser, each with a default. Inherit from it, or implement all of them."""

    @property
    def resident(self) -> bool:
        """Whether the weights stay on the device between requests."""
        return True

    @property
    def unshareable(self) -> str:
        """Why several threads must not use the denoiser concurrently, as a sentence; empty if they may."""
        return ""

    @property
    def best_workers(self) -> int:
        """Number of worker threads that gives the best throughput."""
        return 1

    @property
    def cpu_threads(self) -> int:
        """Number of CPU threads that compute, of all workers together; 0 if another device computes."""
        return 0

    @property
    def on_demand(self) -> bool:
        """Whether models are loaded and unloaded while the engine runs, which needs a single worker thread."""
        return False

    def is_loaded(self, model: str) -> bool:
        """Whether requests of the model can be prepared now. Does not block; any thread may call it."""
        return True

    def has_room_for(self, model: str, busy: Collection[str] | None) -> bool:
        """Whether the model fits once others are unloaded, except `busy` ones; with `None`, if all stay loaded.

        True for a model that can never fit, so that `load` says so. Does not block; any thread may call it.
        """
        return True

    def load(self, model: str, busy: Collection[str], progress: Callable[[float], None]) -> bool:
        """Load a model; unload others, except `busy` ones, if it needs their memory.

        `progress` receives the loaded share (0..1); its `LoadStopped` ends the load. Returns false if there is no room
        until busy models are not busy. Raises `ModelLoadError`, `OutOfMemory`, `DeviceLost`.
        """
        return True

    def unload(self, model: str) -> None:
        """Free everything that belongs to a model. Raises `ModelStays`."""

    def preview(self, state: Any) -> NDArray[np.uint8] | None:
        """Return a small image of a state, uint8, height × width × 3; `None` if the denoiser has no previews."""
        return None

    def release_memory(self) -> None:
        """Free cached device memory that no request uses."""

    def batch_limit(self, request: DiffusionRequest) -> int:
        """Return how many requests of this size there is memory for in a forward pass. Any thread may call it."""
        return sys.maxsize

    def shrink(self, state: Any) -> bool:
        """Use less memory to finish this state. Returns false if that is not possible."""
        return False

    def is_large(self, model: str) -> bool:
        """Whether the model probably uses all cores of a CPU for one request. Does not block; from any thread."""
        return False

    def share_cores(self, shares: int) -> None:
        """Compute on the calling thread with one of so many equal shares of the CPU's cores from now on."""


class Denoiser(DenoiserCapabilities, Protocol[S, P_co]):
    """The model the engine runs. Only the engine's own threads call it."""

    def prepare(self, request: DiffusionRequest) -> S:
        """Return the state of a request before its first step."""

    def step(self, states: Sequence[S]) -> None:
        """Run one denoising step for all states; all have the same `shape`."""

    def finish(self, state: S) -> P_co:
        """Decode a state, an unfinished one by its prediction of the end. Does not change it: a retry is possible."""


class EngineState(StrEnum):
    """Lifecycle of the engine."""

    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class EngineResult(Generic[P]):
    """The product of a request, and seconds per stage. `batched`: it shared at least one forward pass.

    `attempts` counts how often the request was started: more than 1 after a failure of the device or of its batch.
    """

    product: P
    timings: dict[str, float]
    batched: bool
    attempts: int = 1
