"""Failed work is repeated from its request, other requests are unaffected, and a lost device is given up."""

from __future__ import annotations

import threading

import pytest
from fakes import Canvas, FakeDenoiser, FakePixels, until
from squares import DeviceLostDenoiser, EngineOf, OutOfMemoryDenoiser, job, open_gate

from stable_diffusion_server.engine import EngineState
from stable_diffusion_server.engine.device_health import MAX_NOT_FINITE
from stable_diffusion_server.errors import DeviceLost, NotFinite, NotReady, OutOfMemory


@pytest.mark.fault(51)
def test_a_group_too_large_for_the_memory_is_drawn_in_smaller_ones(engine_of: EngineOf) -> None:
    """The shape's cap is halved until the batch fits, memory is freed, and every job succeeds."""
    painter = OutOfMemoryDenoiser(gate=threading.Event(), fits=2)
    engine = engine_of(painter, max_batch=8)
    first = engine.submit(job("first", steps=1, width=128))
    until(lambda: len(painter.batches) == 1)
    tickets = [engine.submit(job(f"a red square {n}")) for n in range(8)]
    open_gate(painter)
    drawings = [ticket.result.result(10) for ticket in (first, *tickets)]
    assert max(len(batch) for batch in painter.batches) == 2
    assert painter.released == 2
    assert [figure.cap for figure in engine.step_timings()] == [8, 2]
    assert max(drawing.attempts for drawing in drawings) == 3


@pytest.mark.fault(51)
def test_running_out_of_memory_in_the_third_step_loses_nothing(engine_of: EngineOf) -> None:
    """The batch restarts from its requests, and later requests work as usual."""
    painter = OutOfMemoryDenoiser(fits=4, third_step_fails=True)
    engine = engine_of(painter)
    tickets = [engine.submit(job(f"a red square {n}")) for n in range(4)]
    assert [ticket.result.result(10).product.pixels[0, 0, 0] for ticket in tickets] == [214] * 4
    assert engine.submit(job("the next")).result.result(10).attempts == 1


@pytest.mark.fault(51)
def test_a_lone_job_without_memory_tries_again_once_and_then_says_so(engine_of: EngineOf) -> None:
    """Memory that was freed may suffice; otherwise the job fails, and the engine goes on."""
    fits = engine_of(OutOfMemoryDenoiser(fits=0, frees=1)).submit(job("a square"))
    assert fits.result.result(10).attempts == 2
    engine = engine_of(OutOfMemoryDenoiser(fits=0))
    with pytest.raises(OutOfMemory):
        engine.submit(job("a square")).result.result(10)
    assert engine.state is EngineState.READY


def test_a_drawn_picture_is_decoded_with_less_memory_and_not_drawn_again(engine_of: EngineOf) -> None:
    """Only the decoding is repeated: memory freed, then with smaller tiles as long as there are any."""
    painter = OutOfMemoryDenoiser(fits=4, decodes_with=2, shrinks=2)
    assert engine_of(painter).submit(job("a square")).result.result(10).attempts == 1
    assert len(painter.batches) == 4
    with pytest.raises(OutOfMemory):
        engine_of(OutOfMemoryDenoiser(decodes_with=3, shrinks=2)).submit(job("a square")).result.result(10)


@pytest.mark.fault(53)
def test_a_poisoned_device_is_given_up(engine_of: EngineOf) -> None:
    """The engine state says so, nothing more is accepted, and the process is to be replaced.

    Requests on the device get device-lost, since one of them may be the cause; queued ones get a retryable error.
    """
    painter, ends = DeviceLostDenoiser(gate=threading.Event()), list[bool]()
    engine = engine_of(painter, max_batch=2, on_device_lost=lambda: ends.append(True))
    tickets = [engine.submit(job(prompt)) for prompt in ("poison", "its mate", "waiting", "waiting too")]
    open_gate(painter)
    for ticket in tickets[:2]:
        with pytest.raises(DeviceLost):
            ticket.result.result(10)
    for ticket in tickets[2:]:
        with pytest.raises(NotReady):
            ticket.result.result(10)
    until(lambda: ends == [True])
    assert engine.state is EngineState.FAILED
    assert "device" in engine.reason
    with pytest.raises(NotReady):
        engine.submit(job("too late"))


@pytest.mark.fault(54)
def test_numbers_that_are_never_finite_are_the_devices_fault(engine_of: EngineOf) -> None:
    """A few in a row are their jobs' errors; one too many, and the device is given up.

    A finite result resets the count.
    """
    painter, ends = DeviceLostDenoiser(finite=False), list[bool]()
    engine = engine_of(painter, on_device_lost=lambda: ends.append(True))
    for _ in range(2):
        painter.finite = False
        for n in range(MAX_NOT_FINITE - 1):
            with pytest.raises(NotFinite):
                engine.submit(job(f"job {n}")).result.result(10)
        painter.finite = True
        assert engine.submit(job("good")).result.result(10).attempts == 1
    painter.finite = False
    for n in range(MAX_NOT_FINITE):
        with pytest.raises(NotFinite):
            engine.submit(job(f"job {n}")).result.result(10)
    until(lambda: ends == [True])
    assert engine.state is EngineState.FAILED


@pytest.mark.fault(161)
def test_adapters_that_are_not_finite_are_their_orders_fault_and_not_the_devices(engine_of: EngineOf) -> None:
    """However many in a row: an internal trial without LoRAs succeeds, and others are served as before."""

    class Overflowing(FakeDenoiser):
        def finish(self, state: Canvas) -> FakePixels:
            if state.job.loras:
                raise NotFinite("The latents are not finite.")
            return super().finish(state)

    painter, ends = Overflowing(), list[bool]()
    engine = engine_of(painter, on_device_lost=lambda: ends.append(True))
    for n in range(3 * MAX_NOT_FINITE):
        with pytest.raises(NotFinite):
            engine.submit(job(f"job {n}", loras=(("hot", 1.0),), lora_digests=("1a",))).result.result(10)
    assert engine.submit(job("plain")).result.result(10).attempts == 1
    assert engine.state is EngineState.READY
    assert ends == []
    assert [(done.loras, done.lora_digests) for done in painter.finished] == [((), ())] * 4


@pytest.mark.fault(161)
def test_a_device_that_is_never_finite_is_found_out_by_orders_with_adapters_too(engine_of: EngineOf) -> None:
    """If all requests name LoRAs, the internal trial without them detects the fault."""
    painter, ends = DeviceLostDenoiser(finite=False), list[bool]()
    engine = engine_of(painter, on_device_lost=lambda: ends.append(True))
    for n in range(MAX_NOT_FINITE):
        with pytest.raises(NotFinite):
            engine.submit(job(f"job {n}", loras=(("fine", 1.0),))).result.result(10)
    until(lambda: ends == [True])
    assert engine.state is EngineState.FAILED


@pytest.mark.fault(161)
def test_a_trial_that_fails_otherwise_tells_nothing(engine_of: EngineOf) -> None:
    """Out of memory in the trial is no request's result, and does not give up the device."""

    class Unlucky(FakeDenoiser):
        def finish(self, state: Canvas) -> FakePixels:
            if state.job.loras:
                raise NotFinite("The latents are not finite.")
            raise OutOfMemory("no memory")

    engine = engine_of(Unlucky())
    for n in range(MAX_NOT_FINITE):
        with pytest.raises(NotFinite):
            engine.submit(job(f"job {n}", loras=(("hot", 1.0),))).result.result(10)
    with pytest.raises(OutOfMemory):
        engine.submit(job("plain")).result.result(10)
    assert engine.state is EngineState.READY


def test_poison_while_preparing_or_finishing_ends_it_as_well(engine_of: EngineOf) -> None:
    """At whatever stage the device reports the error."""

    class PreparePoison(FakeDenoiser):
        def prepare(self, job: object) -> object:  # type: ignore[override]  # it never returns
            raise DeviceLost("lost")

    class FinishPoison(FakeDenoiser):
        def finish(self, state: object) -> object:  # type: ignore[override]  # as above
            raise DeviceLost("lost")

    for painter in (PreparePoison(), FinishPoison()):
        engine = engine_of(painter)
        with pytest.raises(DeviceLost):
            engine.submit(job("a square")).result.result(10)
        assert engine.state is EngineState.FAILED


def test_stopping_in_time_hands_back_what_is_not_done(engine_of: EngineOf) -> None:
    """A job that exceeds the grace period fails with a retryable error, so it can be repeated."""
    painter = FakeDenoiser(gate=threading.Event())
    engine = engine_of(painter)
    begun = engine.submit(job("begun"))
    until(lambda: len(painter.batches) == 1)
    engine.stop(0.01)
    with pytest.raises(NotReady):
        begun.result.result(0)
    open_gate(painter)
    until(lambda: engine.running == 0)
    assert painter.finished == []
