"""The engine: order, batching, cancellation, bounds, failures. Runs on a fake model."""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError
from typing import Any

import pytest
from fakes import FakeDenoiser, until
from squares import EngineOf, job, open_gate

from stable_diffusion_server.engine import Engine, EngineState
from stable_diffusion_server.errors import ModelLoadError, NotReady, QueueFull
from stable_diffusion_server.types import DiffusionRequest, EngineEvent, EngineEventKind


def test_a_job_comes_out_with_its_timings(engine_of: EngineOf) -> None:
    """One job: its image, the seconds of each stage, and a batch size of one."""
    drawing = engine_of(FakeDenoiser()).submit(job("a red square")).result.result(10)
    assert drawing.product.pixels.shape == (64, 64, 3)
    assert set(drawing.timings) == {"queue", "prepare", "denoise", "decode"}
    assert not drawing.batched


def test_jobs_of_one_shape_share_steps_and_those_of_another_wait(engine_of: EngineOf, gated: FakeDenoiser) -> None:
    """Equal shapes run together from the next step on, even past another shape, which waits no longer because of it."""
    engine = engine_of(gated)
    first = engine.submit(job("one"))
    until(lambda: engine.running == 1)
    tickets = [first, engine.submit(job("two")), engine.submit(job("wide", width=128)), engine.submit(job("three"))]
    late = engine.submit(job("longer", steps=5))
    open_gate(gated)
    for ticket in [*tickets, late]:
        ticket.result.result(10)
    assert gated.batches[:5] == [["one"], *[["one", "two", "three"]] * 3, ["two", "three"]]
    # "longer" would have delayed "wide" by a step, so it had to wait itself.
    assert gated.batches[5:] == [*[["wide"]] * 4, *[["longer"]] * 5]


def test_jobs_with_fewer_steps_leave_the_group_earlier(engine_of: EngineOf, gated: FakeDenoiser) -> None:
    """A two-step job beside a six-step one is done after its own two steps."""
    engine = engine_of(gated)
    long, short = engine.submit(job("long", 6)), engine.submit(job("short", 2))
    open_gate(gated)
    assert short.result.result(10).batched
    assert long.result.result(10).batched
    assert sum("short" in batch for batch in gated.batches) == 2
    assert sum("long" in batch for batch in gated.batches) == 6


def test_no_group_is_larger_than_the_cap(engine_of: EngineOf, gated: FakeDenoiser) -> None:
    """Nine jobs with a cap of three: batches of at most three, and all finish."""
    engine = engine_of(gated, max_batch=3)
    tickets = [engine.submit(job(f"job {n}")) for n in range(9)]
    open_gate(gated)
    for ticket in tickets:
        ticket.result.result(10)
    assert max(len(batch) for batch in gated.batches) == 3


@pytest.mark.fault(61)
def test_a_full_queue_refuses_and_says_when_to_come_back(engine_of: EngineOf, gated: FakeDenoiser) -> None:
    """The limit counts waiting jobs: at the limit the next is refused, one fewer and it is accepted."""
    engine = engine_of(gated, queue_limit=2)
    running = engine.submit(job("running", width=128))
    until(lambda: engine.running == 1)
    waiting = [engine.submit(job(f"waiting {n}")) for n in range(2)]
    with pytest.raises(QueueFull) as refused:
        engine.submit(job("one too many"))
    assert refused.value.retry_after is not None
    assert refused.value.retry_after >= 1
    waiting[0].result.cancel()
    accepted = engine.submit(job("fits again"))
    open_gate(gated)
    for ticket in (running, waiting[1], accepted):
        ticket.result.result(10)
    assert "waiting 0" not in [done.prompt for done in gated.finished]


def test_cancelling_frees_the_device_within_one_step(engine_of: EngineOf, gated: FakeDenoiser) -> None:
    """A cancelled job takes part in no step after the current one, and its batch neighbour is unaffected."""
    events: list[EngineEvent] = []
    engine = engine_of(gated, observe=events.append)
    doomed, neighbour = engine.submit(job("doomed", 50)), engine.submit(job("neighbour", 3))
    until(lambda: len(gated.batches) == 1)
    doomed.result.cancel()
    open_gate(gated)
    neighbour.result.result(10)
    until(lambda: engine.running == 0)
    assert sum("doomed" in batch for batch in gated.batches) <= 2
    with pytest.raises(CancelledError):
        doomed.result.result(0)
    assert [event.kind for event in events if event.job_id == doomed.id][-1] is EngineEventKind.CANCELLED


def test_a_job_that_fails_to_prepare_fails_alone(engine_of: EngineOf) -> None:
    """Its error is its result; the next job succeeds."""
    engine = engine_of(FakeDenoiser())
    bad, good = engine.submit(job("unpreparable")), engine.submit(job("good"))
    with pytest.raises(RuntimeError, match="prepare"):
        bad.result.result(10)
    assert good.result.result(10).attempts == 1


def test_a_job_that_breaks_a_step_does_not_fail_its_mates(engine_of: EngineOf, gated: FakeDenoiser) -> None:
    """The batch is repeated one by one: the failing job fails, the others succeed."""
    engine = engine_of(gated)
    blocker = engine.submit(job("blocker", 1, width=128))
    until(lambda: engine.running == 1)
    good, bad, other = (engine.submit(job(prompt)) for prompt in ("good", "unsteppable", "other"))
    open_gate(gated)
    assert good.result.result(10).attempts == 2
    assert other.result.result(10).attempts == 2
    assert blocker.result.result(10).attempts == 1
    with pytest.raises(RuntimeError, match="step"):
        bad.result.result(10)


def test_an_observer_that_fails_does_not_reach_the_device(engine_of: EngineOf) -> None:
    """A broken metric or a full disk under the heartbeat fails no request."""

    def broken(event: EngineEvent) -> None:
        raise OSError("disk full")

    assert engine_of(FakeDenoiser(), observe=broken).submit(job("fine")).result.result(10).attempts == 1


def test_events_tell_the_life_of_a_job(engine_of: EngineOf) -> None:
    """Queued, started, each step counted, done."""
    events: list[EngineEvent] = []
    engine = engine_of(FakeDenoiser(), observe=events.append)
    engine.submit(job("a square", 3)).result.result(10)
    until(lambda: events[-1].kind is EngineEventKind.DONE)
    reported = [(event.kind.value, event.step, event.steps) for event in events]
    assert reported == [
        ("queued", 0, 3),
        ("started", 0, 3),
        ("step", 1, 3),
        ("step", 2, 3),
        ("step", 3, 3),
        ("done", 3, 3),
    ]


def test_models_that_cannot_be_loaded_are_reported_and_nothing_is_accepted() -> None:
    """The engine state has the reason, and a job is refused instead of waiting forever."""

    def fail() -> Any:
        raise ModelLoadError("The model sdxl is missing.")

    engine: Engine[Any] = Engine(fail, queue_limit=1, max_batch=1)
    engine.start()
    until(lambda: engine.state is EngineState.FAILED)
    assert engine.reason == "The model sdxl is missing."
    with pytest.raises(NotReady):
        engine.submit(job("too early"))


@pytest.mark.parametrize("where", ["load", "prepare"])
def test_an_engine_that_ends_says_so_and_leaves_nobody_waiting(where: str) -> None:
    """Even a BaseException: the state reports it, waiting jobs fail, and nothing more is accepted."""

    class Exiting(FakeDenoiser):
        def prepare(self, job: DiffusionRequest) -> Any:
            raise SystemExit(1)

    def load() -> Any:
        if where == "load":
            raise SystemExit(1)
        return Exiting()

    engine: Engine[Any] = Engine(load, queue_limit=4, max_batch=1)
    engine.start()
    if where == "prepare":
        until(lambda: engine.state is EngineState.READY)
        engine.submit(job("the last"))
    until(lambda: engine.state is EngineState.FAILED)
    assert "engine" not in engine.reason
    with pytest.raises(NotReady):
        engine.submit(job("too late"))


def test_stopping_fails_what_waits_and_finishes_what_runs(engine_of: EngineOf, gated: FakeDenoiser) -> None:
    """No caller hangs: the running job finishes, the waiting one fails with a retryable error."""
    engine = engine_of(gated, max_batch=1)
    running, waiting = engine.submit(job("running")), engine.submit(job("waiting"))
    until(lambda: engine.running == 1)
    threading.Timer(0.05, lambda: open_gate(gated)).start()
    engine.stop(10)
    assert running.result.result(10).attempts == 1
    with pytest.raises(NotReady):
        waiting.result.result(10)
    with pytest.raises(NotReady):
        engine.submit(job("too late"))


def test_a_job_that_waits_for_its_next_turn_can_be_cancelled(engine_of: EngineOf, gated: FakeDenoiser) -> None:
    """A long job that was preempted for another shape leaves the queue, and takes no further step."""
    engine = engine_of(gated)
    long = engine.submit(job("long", steps=100))
    until(lambda: len(gated.batches) == 1)
    # Sixty steps of another shape: started after the first one's turn, and still running at the cancellation.
    other = engine.submit(
        job("other", steps=60, width=128),
        watch=lambda event: long.result.cancel() if event.kind is EngineEventKind.STEP and event.step == 3 else None,
    )
    open_gate(gated)
    other.result.result(10)
    until(lambda: engine.running == engine.waiting == 0)
    with pytest.raises(CancelledError):
        long.result.result(0)
    first = gated.batches.index(["other"])
    assert all(batch == ["other"] for batch in gated.batches[first:])


def test_a_job_cancelled_while_it_is_prepared_takes_no_step(engine_of: EngineOf) -> None:
    """The device is free at once, and the end is reported once."""
    tickets, handed_in, events = list[Any](), threading.Event(), list[EngineEvent]()

    class Hesitant(FakeDenoiser):
        def prepare(self, job: DiffusionRequest) -> Any:
            handed_in.wait(10)
            tickets[0].result.cancel()
            return super().prepare(job)

    painter = Hesitant()
    engine = engine_of(painter, observe=events.append)
    tickets.append(engine.submit(job("doomed")))
    handed_in.set()
    until(lambda: engine.running == 0 and events[-1].kind is EngineEventKind.CANCELLED)
    assert painter.batches == []
    assert [event.kind for event in events].count(EngineEventKind.CANCELLED) == 1
