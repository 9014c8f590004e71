"""The engine's faults repeated over a stock pipeline: cancelled, preempted, out of memory, failed, lost, in phases."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_families
import torch
from drawing import Pixels, draw
from fakes import until
from tiny_drawing import tiny_request

from stable_diffusion_server.engine import Engine, EngineState
from stable_diffusion_server.errors import DeviceLost, OutOfMemory
from stable_diffusion_server.pipelines.loading.loader import LoadOptions
from stable_diffusion_server.pipelines.owned_models import find_owned_models
from stable_diffusion_server.pipelines.registry import Registry, load
from stable_diffusion_server.types import DiffusionRequest, EngineEvent, EngineEventKind

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]

PATIENCE = 60


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one tiny pipeline, computed in fp32."""
    folder = tmp_path_factory.mktemp("models")
    tiny_families.build("aura-flow").save_pretrained(folder / "mine")
    (folder / "mine.toml").write_text('native_size = 128\ndtype = "float32"\n')
    return folder


@pytest.fixture
def registry(models: Path) -> Registry:
    """The model, loaded anew, since tests break it."""
    return load(models, "cpu", 1, LoadOptions(models=find_owned_models(models, [models]).specs))


@pytest.fixture
def engine(registry: Registry) -> Iterator[Engine[Any]]:
    """A running engine; afterwards no stock call is left."""
    made: Engine[Any] = Engine(lambda: registry, queue_limit=32, max_batch=4)
    made.start()
    until(lambda: made.state is EngineState.READY)
    yield made
    made.stop(grace=PATIENCE)
    until(lambda: not calls())


def calls() -> list[threading.Thread]:
    """The threads of stock calls."""
    return [thread for thread in threading.enumerate() if thread.name == "stock-call"]


def order(registry: Registry, prompt: str, **changes: Any) -> DiffusionRequest:
    """A request to the model."""
    spec = registry.residents["mine"].spec
    return replace(tiny_request(spec), prompt=prompt, **{"seed": len(prompt), **changes})


def alone(registry: Registry, request: DiffusionRequest) -> Pixels:
    """Its picture, drawn without an engine."""
    return draw(registry, request)


def test_requests_come_out_as_if_each_were_alone(registry: Registry, engine: Engine[Any]) -> None:
    """Of several sizes, steps and seeds; none shares a forward pass."""
    requests = [
        order(registry, "a red circle"),
        order(registry, "a small house", num_inference_steps=2),
        order(registry, "the sea", width=128),
        order(registry, "evening light", seed=3, num_inference_steps=6),
    ]
    tickets = [engine.submit(request) for request in requests]
    results = [ticket.result.result(PATIENCE) for ticket in tickets]
    assert not any(result.batched for result in results)
    for request, result in zip(requests, results, strict=True):
        assert (result.product.pixels == alone(registry, request)).all()


def test_a_request_that_is_cancelled_between_two_steps_ends_its_thread(registry: Registry, engine: Engine[Any]) -> None:
    """As a deadline does it; the next request is drawn as usual."""
    events: list[EngineEvent] = []

    def watch(event: EngineEvent) -> None:
        events.append(event)
        if event.kind is EngineEventKind.STEP and event.step == 3:
            ticket.result.cancel()

    ticket: Any = engine.submit(order(registry, "a red circle", num_inference_steps=50), watch=watch)
    with pytest.raises(CancelledError):
        ticket.result.result(PATIENCE)
    until(lambda: not calls())
    assert max(event.step or 0 for event in events) <= 4
    after = order(registry, "the sea")
    assert (engine.submit(after).result.result(PATIENCE).product.pixels == alone(registry, after)).all()


def test_a_preempted_request_waits_and_goes_on(registry: Registry, engine: Engine[Any]) -> None:
    """A background request yields to another size after its time slice, and keeps its steps and its picture."""
    long, short = order(registry, "a small house", num_inference_steps=20), order(registry, "the sea", width=128)
    seen: list[str] = []
    tickets: list[Any] = []

    def watch(event: EngineEvent) -> None:
        seen.append(f"long {event.step}" if event.kind is EngineEventKind.STEP else str(event.kind))
        if event.kind is EngineEventKind.STEP and event.step == 1:
            tickets.append(engine.submit(short, watch=lambda event: seen.append(f"short {event.step}")))

    background = engine.submit(long, background=True, watch=watch)
    result = background.result.result(PATIENCE)
    assert (tickets[0].result.result(PATIENCE).product.pixels == alone(registry, short)).all()
    assert (result.product.pixels == alone(registry, long)).all()
    assert result.attempts == 1
    assert seen.index("short 4") < seen.index("long 20")
    assert len([each for each in seen if each.startswith("long")]) == 20, "no step was taken twice"


def test_a_preempted_request_that_is_cancelled_ends_its_thread(registry: Registry, engine: Engine[Any]) -> None:
    """While it waits in the queue."""
    long, short = order(registry, "a small house", num_inference_steps=60), order(registry, "the sea", width=128)
    tickets: list[Any] = []

    def watch(event: EngineEvent) -> None:
        if event.kind is EngineEventKind.STEP and event.step == 1:
            tickets.append(engine.submit(replace(short, num_inference_steps=30), watch=cancel))

    def cancel(event: EngineEvent) -> None:
        if event.kind is EngineEventKind.STEP and event.step == 2:
            assert len(calls()) == 2
            background.result.cancel()

    background: Any = engine.submit(long, background=True, watch=watch)
    with pytest.raises(CancelledError):
        background.result.result(PATIENCE)
    until(lambda: len(calls()) <= 1)
    tickets[0].result.result(PATIENCE)


def failing(registry: Registry, monkeypatch: pytest.MonkeyPatch, part: str, passes: range, error: Any) -> list[int]:
    """Let passes of a part raise; returns the numbers of its passes so far."""
    network = getattr(registry.residents["mine"].family.pipeline, part)  # type: ignore[attr-defined]  # the stock family
    name = "decode" if part == "vae" else "forward"
    whole, seen = getattr(network, name), list[int]()

    def passing(*given: Any, **named: Any) -> Any:
        seen.append(len(seen))
        if seen[-1] in passes:
            raise error()
        return whole(*given, **named)

    monkeypatch.setattr(network, name, passing)
    return seen


@pytest.mark.fault(51)
def test_a_step_without_memory_is_taken_again(
    registry: Registry, engine: Engine[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The request starts anew, once; its picture is the same. Without memory both times it fails, and others do not."""
    request = order(registry, "a red circle")
    expected = alone(registry, request)
    seen = failing(registry, monkeypatch, "transformer", range(2, 3), lambda: torch.OutOfMemoryError("no memory"))
    result = engine.submit(request).result.result(PATIENCE)
    assert result.attempts == 2
    assert (result.product.pixels == expected).all()
    assert len(seen) == 3 + 4
    monkeypatch.undo()
    failing(registry, monkeypatch, "transformer", range(6), lambda: torch.OutOfMemoryError("no memory"))
    with pytest.raises(OutOfMemory):
        engine.submit(request).result.result(PATIENCE)
    monkeypatch.undo()
    assert (engine.submit(request).result.result(PATIENCE).product.pixels == expected).all()


@pytest.mark.fault(51)
def test_a_prompt_without_memory_is_encoded_again(
    registry: Registry, engine: Engine[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first step as well."""
    failing(registry, monkeypatch, "text_encoder", range(1), lambda: torch.OutOfMemoryError("no memory"))
    assert engine.submit(order(registry, "a red circle")).result.result(PATIENCE).attempts == 2


@pytest.mark.fault(51)
def test_a_picture_without_memory_is_decoded_in_tiles(
    registry: Registry, engine: Engine[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not drawn again."""
    seen = failing(registry, monkeypatch, "vae", range(2), lambda: torch.OutOfMemoryError("no memory"))
    result = engine.submit(order(registry, "a red circle")).result.result(PATIENCE)
    assert (result.attempts, result.product.tiled, len(seen)) == (1, True, 3)


def test_an_error_of_the_class_fails_its_request_only(
    registry: Registry, engine: Engine[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it raises."""
    request = order(registry, "a red circle")
    failing(registry, monkeypatch, "transformer", range(1, 2), lambda: RuntimeError("shapes differ"))
    tickets = [engine.submit(request), engine.submit(replace(request, seed=1))]
    with pytest.raises(RuntimeError):
        tickets[0].result.result(PATIENCE)
    assert tickets[1].result.result(PATIENCE).attempts == 1


@pytest.mark.fault(53)
def test_a_lost_device_ends_the_engine_and_the_calls(
    registry: Registry, engine: Engine[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also the call of a request that waits preempted."""
    failing(registry, monkeypatch, "transformer", range(1, 2), lambda: torch.AcceleratorError("device lost", 2))
    ticket = engine.submit(order(registry, "a red circle"))
    with pytest.raises(DeviceLost):
        ticket.result.result(PATIENCE)
    until(lambda: engine.state is EngineState.FAILED)
    del ticket
    until(lambda: not calls())


def test_a_stop_ends_the_calls_that_are_under_way(registry: Registry) -> None:
    """After the grace the request fails, and its thread ends."""
    engine: Engine[Any] = Engine(lambda: registry, queue_limit=8, max_batch=1)
    engine.start()
    until(lambda: engine.state is EngineState.READY)
    begun = threading.Event()
    ticket = engine.submit(
        order(registry, "a red circle", num_inference_steps=400),
        watch=lambda event: begun.set() if event.kind is EngineEventKind.STEP else None,
    )
    assert begun.wait(PATIENCE)
    engine.stop(grace=0)
    assert ticket.result.exception(PATIENCE) is not None
    until(lambda: not calls(), 30)


class Moving(Registry):
    """A registry whose weights move, as under offloading, and which notes what runs."""

    notes: list[tuple[str, int]]

    @property
    def resident(self) -> bool:
        return False

    def prepare(self, request: DiffusionRequest) -> Any:
        self.notes.append(("prepare", request.seed))
        return super().prepare(request)

    def step(self, states: Sequence[Any]) -> None:
        assert len(states) == 1
        self.notes.append(("step", states[0].request.seed))
        super().step(states)

    def finish(self, state: Any) -> Any:
        self.notes.append(("finish", state.request.seed))
        return super().finish(state)


def test_under_offloading_no_two_calls_are_interleaved(registry: Registry) -> None:
    """Each request is prepared, drawn and decoded before the next one begins, also one of another size."""
    moving = Moving(residents=registry.residents)
    moving.notes = []
    engine: Engine[Any] = Engine(lambda: moving, queue_limit=8, max_batch=4)
    engine.start()
    until(lambda: engine.state is EngineState.READY)
    requests = [order(registry, "the sea", seed=n, width=64 * (1 + n % 2), num_inference_steps=8) for n in range(4)]
    tickets = [engine.submit(request) for request in requests]
    drawn = [ticket.result.result(PATIENCE).product.pixels for ticket in tickets]
    engine.stop(grace=PATIENCE)
    assert [seed for kind, seed in moving.notes if kind == "prepare"] == [
        seed for kind, seed in moving.notes if kind == "finish"
    ]
    blocks = [moving.notes[at : at + 10] for at in range(0, len(moving.notes), 10)]
    assert len(blocks) == 4
    assert all(len({seed for _, seed in block}) == 1 for block in blocks)
    assert all((pixels == alone(registry, one)).all() for pixels, one in zip(drawn, requests, strict=True))
