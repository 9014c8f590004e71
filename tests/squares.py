"""Jobs for the fake model, engines that stop with their test, and fake models with particular faults."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from fakes import Canvas, FakeDenoiser, FakePixels, until
from numpy.typing import NDArray

from stable_diffusion_server.engine import Engine, EngineState
from stable_diffusion_server.errors import DeviceLost, NotFinite, OutOfMemory
from stable_diffusion_server.types import DiffusionRequest, Task

EngineOf = Callable[..., Engine[Any]]


def job(prompt: str, steps: int = 4, width: int = 64, **more: Any) -> DiffusionRequest:
    """A job of few pixels."""
    return DiffusionRequest(Task.TEXT_TO_IMAGE, "sdxl", "test", prompt, None, width, 64, 1, steps, 1.0, "euler", **more)


def open_gate(painter: FakeDenoiser) -> None:
    """Let a gated model's steps continue."""
    assert painter.gate is not None
    painter.gate.set()


@pytest.fixture
def engine_of() -> Iterator[EngineOf]:
    """Make a running engine."""
    made: list[Engine[Any]] = []

    def make(painter: FakeDenoiser, queue_limit: int = 32, max_batch: int = 4, **more: Any) -> Engine[Any]:
        engine: Engine[Any] = Engine(lambda: painter, queue_limit=queue_limit, max_batch=max_batch, **more)
        engine.start()
        until(lambda: engine.state is EngineState.READY)
        made.append(engine)
        return engine

    yield make
    for engine in made:
        engine.stop(10)


@pytest.fixture
def gated() -> Iterator[FakeDenoiser]:
    """A fake model whose every step waits until the gate is open."""
    painter = FakeDenoiser(gate=threading.Event())
    yield painter
    open_gate(painter)


@dataclass
class OutOfMemoryDenoiser(FakeDenoiser):
    """Memory for so many canvases per step, and so many per finish; counts the requests to free memory.

    Freeing memory makes room for one canvas more in a step, `frees` times; each shrink of a canvas makes one more
    decoding of it fit, `shrinks` times.
    """

    fits: int = 2
    decodes_with: int = 0
    shrinks: int = 0
    frees: int = 0
    released: int = 0
    shrunk_by_state: dict[int, int] = field(default_factory=dict)
    third_step_fails: bool = False

    def step(self, states: Sequence[Canvas]) -> None:
        if len(states) > self.fits:
            raise OutOfMemory("no memory")
        if self.third_step_fails and any(state.index == 2 for state in states):
            self.third_step_fails = False
            raise OutOfMemory("no memory in the third step")
        super().step(states)

    def finish(self, state: Canvas) -> FakePixels:
        if self.shrunk_by_state.get(id(state), 0) < self.decodes_with:
            raise OutOfMemory("no memory to decode")
        return super().finish(state)

    def release_memory(self) -> None:
        self.released += 1
        if self.frees:
            self.frees -= 1
            self.fits += 1

    def shrink(self, state: Canvas) -> bool:
        shrunk = self.shrunk_by_state.get(id(state), 0)
        self.shrunk_by_state[id(state)] = min(shrunk + 1, self.shrinks)
        return shrunk < self.shrinks


@dataclass
class DeviceLostDenoiser(FakeDenoiser):
    """Loses the device in the step after a prompt says "poison", or returns non-finite images."""

    finite: bool = True

    def step(self, states: Sequence[Canvas]) -> None:
        super().step(states)
        if any("poison" in state.job.prompt for state in states):
            raise DeviceLost("The device reported an error it cannot recover from.")

    def finish(self, state: Canvas) -> FakePixels:
        if not self.finite:
            raise NotFinite("The latents are not finite.")
        return super().finish(state)


@dataclass
class RecordingDenoiser(FakeDenoiser):
    """Moves its weights off the device between phases; `did` records the calls in order."""

    resident: bool = False
    did: list[str] = field(default_factory=list)

    def prepare(self, job: DiffusionRequest) -> Canvas:
        self.did.append("prepare")
        return super().prepare(job)

    def step(self, states: Sequence[Canvas]) -> None:
        self.did.append(f"step {len(states)}")
        super().step(states)

    def finish(self, state: Canvas) -> FakePixels:
        self.did.append("finish")
        return super().finish(state)

    def release_memory(self) -> None:
        self.did.append("release")


@dataclass
class CpuBoundDenoiser(FakeDenoiser):
    """Computes for 3 ms per step, and waits longer the more canvases there are."""

    cpu_threads: int = 1

    def step(self, states: Sequence[Canvas]) -> None:
        end = time.thread_time() + 0.003
        while time.thread_time() < end:
            pass
        self.seconds_per_step = 0.01 if len(states) == 1 else 0.05
        super().step(states)


@dataclass
class PreviewingDenoiser(FakeDenoiser):
    """With a preview: a grey equal to the number of steps done."""

    sketches: int = 0

    def preview(self, state: Canvas) -> NDArray[np.uint8]:
        self.sketches += 1
        return np.full((8, 8, 3), state.index, np.uint8)


@dataclass
class ConcurrentDenoiser(FakeDenoiser):
    """Allows several workers; records how many ran, and whether two ever prepared at once."""

    threads: set[int] = field(default_factory=set)
    lanes_told: list[int] = field(default_factory=list)
    unshareable: str = ""
    best_workers: int = 1
    at_once: Counter[str] = field(default_factory=Counter)
    most: Counter[str] = field(default_factory=Counter)
    together: threading.Barrier | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def share_cores(self, lanes: int) -> None:
        self.lanes_told.append(lanes)

    def _within(self, what: str, by: int) -> None:
        with self._lock:
            self.at_once[what] += by
            self.most[what] = max(self.most[what], self.at_once[what])

    def prepare(self, job: DiffusionRequest) -> Canvas:
        self._within("prepare", 1)
        try:
            return super().prepare(job)
        finally:
            self._within("prepare", -1)

    def step(self, states: Sequence[Canvas]) -> None:
        self.threads.add(threading.get_ident())
        if self.together is not None:
            self.together.wait(10)
        self._within("step", 1)
        try:
            super().step(states)
        finally:
            self._within("step", -1)
