"""Requests of more models than fit into memory: who runs next, which model is loaded, who fails, who is cancelled."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from concurrent.futures import CancelledError
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from fakes import Canvas, FakeDenoiser, until
from squares import EngineOf, job, open_gate

from stable_diffusion_server.engine import Engine
from stable_diffusion_server.errors import ModelLoadError, ModelStays, QueueFull
from stable_diffusion_server.types import DiffusionRequest, EngineEvent, EngineEventKind


def of(model: str, prompt: str = "a", **more: Any) -> DiffusionRequest:
    """A job of a model."""
    return replace(job(prompt, **more), model=model)


@dataclass
class ModelMemory(FakeDenoiser):
    """Has room for so many models; unloads the least recently used. Fails if a model is used that is not there."""

    room: int = 2
    on_demand: bool = True
    there: dict[str, None] = field(default_factory=dict)
    did: list[str] = field(default_factory=list)
    broken: dict[str, Exception] = field(default_factory=dict)
    parts: int = 4
    load_gate: threading.Event | None = None
    loading: threading.Event = field(default_factory=threading.Event)

    def is_loaded(self, model: str) -> bool:
        return model in self.there

    def has_room_for(self, model: str, busy: Collection[str] | None) -> bool:
        kept = self.there if busy is None else [name for name in self.there if name in busy]
        return len(kept) < self.room

    def load(self, model: str, busy: Collection[str], progress: Callable[[float], None]) -> bool:
        assert self.has_room_for(model, busy)
        self.loading.set()
        for part in range(self.parts):
            progress(part / self.parts)
            if self.load_gate is not None:
                assert self.load_gate.wait(30), "the test forgot to open the gate"
        if model in self.broken:
            raise self.broken[model]
        while len(self.there) >= self.room:
            self.unload(next(name for name in self.there if name not in busy))
        self.there[model] = None
        self.did.append(f"+{model}")
        return True

    def unload(self, model: str) -> None:
        self.there.pop(model, None)
        self.did.append(f"-{model}")

    def prepare(self, job: DiffusionRequest) -> Canvas:
        self._use(job.model)
        return super().prepare(job)

    def step(self, states: Any) -> None:
        for state in states:
            self._use(state.job.model)
        super().step(states)

    def _use(self, model: str) -> None:
        self.there[model] = self.there.pop(model)

    @property
    def loads(self) -> list[str]:
        """The models in the order of their loads."""
        return [entry[1:] for entry in self.did if entry.startswith("+")]


@pytest.fixture
def memory() -> Any:
    """Room for two models; steps and loads wait until their gates are open."""
    made = ModelMemory(gate=threading.Event(), load_gate=threading.Event())
    yield made
    for gate in (made.gate, made.load_gate):
        assert gate is not None
        gate.set()


def open_all(memory: ModelMemory) -> None:
    """Let steps and loads continue."""
    open_gate(memory)
    assert memory.load_gate is not None
    memory.load_gate.set()


def test_a_model_is_loaded_for_the_first_request_that_names_it(engine_of: EngineOf) -> None:
    """The load is reported by its share; a second request finds the model there."""
    memory, seen = ModelMemory(), list[EngineEvent]()
    engine = engine_of(memory)
    engine.submit(of("a"), watch=seen.append).result.result(10)
    engine.submit(of("a")).result.result(10)
    assert memory.did == ["+a"]
    assert [event.loaded for event in seen if event.kind is EngineEventKind.LOADING] == [0.0, 0.0, 0.25, 0.5, 0.75]
    assert [event.kind for event in seen].index(EngineEventKind.LOADING) < [e.kind for e in seen].index(
        EngineEventKind.STARTED
    )


def test_requests_of_a_loaded_model_go_before_a_switch(engine_of: EngineOf, memory: ModelMemory) -> None:
    """Memory for one, alternating requests, patience without end: each model is loaded once."""
    memory.room = 1
    engine = engine_of(memory, switch_patience=1e9)
    tickets = [engine.submit(of("ab"[n % 2], f"{n}")) for n in range(12)]
    open_all(memory)
    for ticket in tickets:
        ticket.result.result(10)
    assert memory.loads == ["a", "b"]


def test_an_overdue_request_waits_for_those_that_a_load_was_for_and_no_others(
    engine_of: EngineOf, memory: ModelMemory
) -> None:
    """Without patience: what arrives for `a` after its load does not go before `b`, and nothing thrashes."""
    memory.room = 1
    engine = engine_of(memory, switch_patience=0.0, max_batch=1)
    first = [engine.submit(of("a", f"early {n}")) for n in range(3)]
    until(lambda: engine.running == 0 and engine.waiting == 3)
    assert memory.load_gate is not None
    memory.load_gate.set()
    until(lambda: engine.running == 1)
    waits = engine.submit(of("b", "waits"))
    late = [engine.submit(of("a", f"late {n}")) for n in range(3)]
    open_all(memory)
    for ticket in [*first, waits, *late]:
        ticket.result.result(10)
    order = [request.prompt for request in memory.prepared]
    assert order == ["early 0", "early 1", "early 2", "waits", "late 0", "late 1", "late 2"]
    assert memory.loads == ["a", "b", "a"]


def test_sixty_mixed_requests_of_three_models_switch_seldom_and_starve_nobody(engine_of: EngineOf) -> None:
    """Memory for two of three models: every request is done, with few loads, whatever the patience."""
    for patience in (0.0, 1e9):
        memory = ModelMemory(room=2, gate=threading.Event(), load_gate=threading.Event())
        engine = engine_of(memory, queue_limit=100, switch_patience=patience)
        names = [str(name) for name in np.random.default_rng(7).choice(list("abc"), 60)]
        tickets = [engine.submit(of(name, f"{name} {n}", steps=2)) for n, name in enumerate(names)]
        open_all(memory)  # all have arrived before the first load ends: the loads depend on no speed
        for ticket in tickets:
            ticket.result.result(20)
        assert sorted(f"{job.model}" for job in memory.prepared) == sorted(names)
        assert all(job.prompt.startswith(job.model) for job in memory.finished)
        assert len(memory.loads) <= 8, memory.did


def test_a_model_with_a_parked_request_stays(engine_of: EngineOf, memory: ModelMemory) -> None:
    """A long request gives way to another model after its time slice, and keeps its own model in memory meanwhile."""
    engine = engine_of(memory, switch_patience=0.0)
    long = engine.submit(of("a", "long", steps=80))
    until(lambda: engine.waiting == 1)
    assert memory.load_gate is not None
    memory.load_gate.set()
    until(lambda: engine.running == 1)
    others = [engine.submit(of(name, name, steps=1)) for name in "bcd"]
    open_all(memory)
    for ticket in [long, *others]:
        ticket.result.result(20)
    assert long.result.result(0).attempts == 1
    assert "-a" not in memory.did[: memory.did.index("+d")] or len(memory.batches) > 80
    assert sorted(request.prompt for request in memory.finished) == ["b", "c", "d", "long"]


def test_a_model_that_cannot_be_loaded_fails_its_own_requests_only(engine_of: EngineOf, memory: ModelMemory) -> None:
    """The sentence reaches each request of the broken model; the others are drawn."""
    memory.broken["broken"] = ModelLoadError("broken.safetensors ends too early.")
    engine = engine_of(memory, switch_patience=0.0)
    good = [engine.submit(of(name, name)) for name in "abc"]
    bad = [engine.submit(of("broken", f"{n}")) for n in range(3)]
    open_all(memory)
    for ticket in good:
        ticket.result.result(10)
    for ticket in bad:
        with pytest.raises(ModelLoadError, match="ends too early"):
            ticket.result.result(10)
    engine.submit(of("a")).result.result(10)


def test_a_load_ends_when_nobody_waits_for_it_any_more(engine_of: EngineOf, memory: ModelMemory) -> None:
    """Two requests wait; after both are cancelled the load stops at its next report, and the next model is loaded."""
    engine = engine_of(memory)
    first, second = engine.submit(of("a")), engine.submit(of("a"))
    until(lambda: engine.waiting == 2)
    first.result.cancel()
    second.result.cancel()
    third = engine.submit(of("b"))
    open_all(memory)
    third.result.result(10)
    assert memory.loads == ["b"]
    with pytest.raises(CancelledError):
        first.result.result(0)


def test_a_load_without_a_picture_is_done_when_the_model_is_there(engine_of: EngineOf) -> None:
    """`load_model` waits in the queue as any request, counts as no job, and fails with the sentence."""
    memory, seen = ModelMemory(), list[EngineEvent]()
    memory.broken["broken"] = ModelLoadError("It is broken.")
    engine = engine_of(memory, observe=seen.append)
    engine.load_model("a").result.result(10)
    engine.load_model("a").result.result(10)
    with pytest.raises(ModelLoadError):
        engine.load_model("broken").result.result(10)
    assert memory.did == ["+a"]
    assert not seen
    assert engine.waiting == engine.running == 0


def test_a_load_for_a_job_takes_its_place_among_jobs(engine_of: EngineOf, memory: ModelMemory) -> None:
    """A request of the same moment goes first, and a caller's share of the queue does not refuse it."""
    memory.room = 1
    engine = engine_of(memory, queue_limit=10)
    first = engine.submit(of("a", "first"), owner="ann")
    until(lambda: memory.loading.is_set())
    waiting = [engine.load_model("b", owner="ann", background=True)]
    waiting += [engine.submit(of("c", f"{n}"), owner="ann") for n in range(7)]
    with pytest.raises(QueueFull):
        engine.load_model("d", owner="ann")
    waiting += [engine.load_model("d", owner="ann", background=True)]
    open_all(memory)
    for ticket in [first, *waiting]:
        ticket.result.result(10)
    assert memory.loads == ["a", "c", "b", "d"]


def test_a_model_is_unloaded_when_no_request_uses_it(engine_of: EngineOf, memory: ModelMemory) -> None:
    """Unloading waits for the request on the device, and the next request loads the model again."""
    engine = engine_of(memory)
    assert memory.load_gate is not None
    memory.load_gate.set()
    ticket = engine.submit(of("a"))
    until(lambda: engine.running == 1)
    unloaded = engine.unload_model("a")
    assert not unloaded.done()
    open_all(memory)
    ticket.result.result(10)
    unloaded.result(10)
    assert memory.did == ["+a", "-a"]
    engine.submit(of("a")).result.result(10)
    assert memory.loads == ["a", "a"]


def test_later_requests_do_not_put_an_unloading_off(engine_of: EngineOf, memory: ModelMemory) -> None:
    """What runs is finished; what came after it waits for the model's next load, alone or in the same batch."""
    for size in (1, 4):
        memory.did.clear()
        engine = engine_of(memory, max_batch=size)
        assert memory.gate is not None
        assert memory.load_gate is not None
        memory.gate.clear()
        memory.load_gate.set()
        first = engine.submit(of("a", "first"))
        until(lambda engine=engine: engine.running == 1)
        unloaded = engine.unload_model("a")
        later = [engine.submit(of("a", f"later {n}")) for n in range(3)]
        loaded = engine.load_model("a")
        assert not loaded.result.done()
        open_all(memory)
        for ticket in [first, *later, loaded]:
            ticket.result.result(10)
        unloaded.result(10)
        assert memory.did == ["+a", "-a", "+a"]
        engine.unload_model("a").result(10)


def test_models_that_are_all_loaded_at_the_start_stay(engine_of: EngineOf) -> None:
    """Without models on demand there is nothing to unload, and a load is done at once."""
    engine: Engine[Any] = engine_of(FakeDenoiser())
    engine.load_model("sdxl").result.result(10)
    with pytest.raises(ModelStays):
        engine.unload_model("sdxl")


def test_unloading_ends_with_the_engine(engine_of: EngineOf, memory: ModelMemory) -> None:
    """Whoever waits for an unloading hears that the server goes down."""
    engine = engine_of(memory)
    assert memory.load_gate is not None
    memory.load_gate.set()
    engine.submit(of("a"))
    until(lambda: engine.running == 1)
    unloaded = engine.unload_model("a")
    engine.drain()
    assert unloaded.exception(10) is not None
