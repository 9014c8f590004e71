"""What the engine is given to draw with, and what it gives back. Nouns alone."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from stable_diffusion_server.types import DiffusionRequest

S = TypeVar("S", bound="DenoisingState")
P = TypeVar("P")
P_co = TypeVar("P_co", covariant=True)


class DenoisingState(Protocol):
    """A job between two steps, as far as the engine has to know it."""

    index: int

    @property
    def shape(self) -> Hashable:
        """What must be equal to share a forward pass."""

    @property
    def steps(self) -> int:
        """Steps in all."""

    @property
    def done(self) -> bool:
        """Whether no step is left."""


class Denoiser(Protocol[S, P_co]):
    """What the engine draws with, called from the engine's own threads alone.

    It may offer more: see `DenoiserCapabilities`.
    """

    def prepare(self, job: DiffusionRequest) -> S:
        """The job's state before its first step."""

    def step(self, states: Sequence[S]) -> None:
        """One step for every state; they share a shape."""

    def finish(self, state: S) -> P_co:
        """What a state that is done comes to. Leaves the state as it is."""


@dataclass(frozen=True, slots=True)
class DenoiserCapabilities:
    """What a denoiser can do beside the contract; whatever it has no attribute for is left out.

    `resident`: its weights stay on the device between drawings. `unshareable` says in a sentence why several
    threads may not draw with it at once, and is empty where they may. `preview(state)` is a small picture of where a
    state stands, height × width × 3 uint8. `release_memory()` gives back what no drawing uses, `shrink()` takes less
    memory from now on and is false when there is no less. `enter_lane(lanes)` is called by each of several lanes, on
    its own thread; `best_lanes` is how many are worth while. `cpu_threads` is how many it computes with, the
    lanes together; 0 where another device computes.
    """

    resident: bool = True
    unshareable: str = ""
    preview: Callable[[Any], NDArray[np.uint8]] | None = None
    release_memory: Callable[[], object] = lambda: None
    shrink: Callable[[], bool] = lambda: False
    enter_worker: Callable[[int], object] = lambda lanes: None
    best_workers: int = 1
    cpu_threads: int = 0

    @classmethod
    def of(cls, denoiser: object) -> DenoiserCapabilities:
        """The abilities a denoiser has."""
        offered = {name: getattr(denoiser, name) for name in cls.__slots__ if hasattr(denoiser, name)}
        return cls(**offered)


class EngineState(StrEnum):
    """Where the engine is in its own life."""

    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class EngineResult(Generic[P]):
    """What came out of a job: the product, seconds spent per stage, and whether it shared forward passes.

    `attempts` is how often it was begun: more than once where the device or a mate had failed it.
    """

    product: P
    timings: dict[str, float]
    batched: bool
    attempts: int = 1
