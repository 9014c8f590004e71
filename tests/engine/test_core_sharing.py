"""Cores are divided by how many workers compute and by measured step times; the operator's own number is kept."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest
from fakes import Canvas, until
from squares import ConcurrentDenoiser, EngineOf, job

from stable_diffusion_server.engine.batch_tuner import LONG_STEP, MAX_SAMPLES, MAX_SHAPES, CoreSharing
from stable_diffusion_server.types import DiffusionRequest


def request(model: str, width: int = 64) -> DiffusionRequest:
    """A request of the model "small" or "large"."""
    return replace(job("a square", width=width), model=model)


def sharing_of(workers: int, *, fixed: bool = False) -> CoreSharing:
    """Cores for so many workers."""
    return CoreSharing(workers, fixed=fixed, is_large=lambda model: model == "large")


def computing(model: str, seconds: float | None = None) -> CoreSharing:
    """Two workers, of which the first computes alone, in so many seconds on all cores."""
    sharing = sharing_of(2)
    sharing.start("first", request(model))
    if seconds is not None:
        for _ in range(MAX_SAMPLES):
            shares = sharing.shares_for("first")
            sharing.record_step("first", shares, seconds * shares)
    return sharing


@pytest.mark.parametrize(
    ("model", "seconds", "shares", "side_by_side"),
    [
        ("small", None, 2, True),
        ("large", None, 1, False),
        ("small", LONG_STEP, 2, True),
        ("small", 1.01 * LONG_STEP, 1, False),
        ("large", LONG_STEP, 1, True),
        ("large", 1.01 * LONG_STEP, 1, False),
    ],
)
def test_long_steps_have_all_cores_and_short_ones_run_side_by_side(
    model: str, seconds: float | None, shares: int, side_by_side: bool
) -> None:
    """Just at the bound and just above it; before the first measurement, the size of the model decides."""
    sharing = computing(model, seconds)
    assert sharing.shares_for("first") == shares
    assert sharing.may_start("second", request(model)) is side_by_side
    assert sharing.may_start("second", request("small", 128)) is side_by_side
    assert not sharing.may_start("second", request("large", 128))
    assert sharing.rest("first")
    assert not sharing.rest("first")
    assert sharing.may_start("second", request(model))


def test_two_that_compute_divide_the_cores() -> None:
    """Whoever remains has all of them again."""
    sharing = computing("large", seconds=LONG_STEP / 2)
    sharing.start("second", request("large"))
    assert [sharing.shares_for(worker) for worker in ("first", "second")] == [2, 2]
    sharing.rest("second")
    assert sharing.shares_for("first") == 1


def test_a_shape_that_becomes_slower_while_two_compute_lets_them_finish() -> None:
    """They keep their shares, and no third one starts."""
    sharing = sharing_of(3)
    for worker in ("first", "second"):
        sharing.start(worker, request("small"))
    for _ in range(2 * MAX_SAMPLES):
        sharing.record_step("first", 3, 4 * LONG_STEP)
    assert sharing.shares_for("first") == 3
    assert not sharing.may_start("third", request("small"))


@pytest.mark.parametrize(("model", "shares"), [("small", 2), ("large", 1)])
@pytest.mark.parametrize("seconds", [None, LONG_STEP / 2, 2 * LONG_STEP])
def test_a_request_alone_has_the_same_number_of_cores_at_all_times(
    model: str, shares: int, seconds: float | None
) -> None:
    """Whatever was measured and whoever else computes: another number of threads would change its bits."""
    sharing = computing(model, seconds)
    sharing.rest("first")
    lone = replace(request(model), alone=True)
    assert sharing.may_start("first", lone)
    sharing.start("first", lone)
    assert sharing.shares_for("first") == shares
    assert sharing.may_start("second", lone) is (model == "small")
    if model == "small":
        sharing.start("second", lone)
        assert sharing.shares_for("first") == sharing.shares_for("second") == shares
        sharing.rest("first")
    else:
        assert not sharing.may_start("second", request("small", 128))
        sharing.rest("first")
        sharing.start("second", request("small", 128))
        assert not sharing.may_start("first", lone)


def test_one_slow_step_decides_nothing() -> None:
    """Another program took the processor for a while."""
    sharing = computing("small", seconds=0.01)
    sharing.record_step("first", 2, 100.0)
    assert sharing.may_start("second", request("small"))


@pytest.mark.parametrize("workers", [1, 3])
def test_a_number_that_the_operator_chose_is_kept(workers: int) -> None:
    """Each worker has its share, alone or not, and nobody waits, however long steps take."""
    sharing = sharing_of(workers, fixed=True)
    sharing.start("first", request("large"))
    for _ in range(2 * MAX_SAMPLES):
        sharing.record_step("first", workers, 20 * LONG_STEP * workers)
    assert sharing.shares_for("first") == workers
    assert sharing.may_start("second", request("large"))


def test_shapes_are_forgotten() -> None:
    """A caller that asks for ever other sizes fills no memory; a forgotten one counts by its size again."""
    sharing = computing("large", seconds=LONG_STEP / 2)
    sharing.rest("first")
    sharing.start("second", request("small"))
    assert sharing.may_start("first", request("large"))
    for number in range(1, MAX_SHAPES + 1):
        sharing.start("second", request("small", 8 * number))
        sharing.record_step("second", 1, 0.0)
    assert not sharing.may_start("first", request("large"))


@dataclass
class DividedDenoiser(ConcurrentDenoiser):
    """Four cores; records into how many shares they are divided in each step, by prompt."""

    cpu_threads: int = 4
    large: bool = False
    divided: dict[str, list[int]] = field(default_factory=dict)
    shares: threading.local = field(default_factory=threading.local)

    def is_large(self, model: str) -> bool:
        return self.large

    def share_cores(self, lanes: int) -> None:
        super().share_cores(lanes)
        self.shares.number = lanes

    def step(self, states: Sequence[Canvas]) -> None:
        for state in states:
            self.divided.setdefault(state.job.prompt, []).append(self.shares.number)
        super().step(states)


@pytest.mark.parametrize("large", [False, True])
def test_a_lone_request_of_a_large_model_has_all_cores(large: bool, engine_of: EngineOf) -> None:
    """Without a setting; short steps then run side by side, with half of the cores each."""
    painter = DividedDenoiser(best_workers=2, large=large)
    engine = engine_of(painter, workers=0, max_batch=1)
    engine.submit(job("alone", steps=6)).result.result(10)
    assert set(painter.divided["alone"]) == ({1} if large else {2})
    painter.together = threading.Barrier(2)  # each step now needs the other worker
    tickets = [engine.submit(job(f"job {n}", steps=4)) for n in range(2)]
    for ticket in tickets:
        ticket.result.result(10)
    assert painter.most["step"] == 2
    assert 2 in painter.divided["job 0"] + painter.divided["job 1"]


def test_large_requests_that_were_not_measured_take_turns(engine_of: EngineOf) -> None:
    """Two workers and two requests at once: the second one waits, and both have all cores."""
    painter = DividedDenoiser(best_workers=2, large=True, gate=threading.Event())
    engine = engine_of(painter, workers=0, max_batch=1)
    tickets = [engine.submit(job(f"job {n}", steps=1)) for n in range(2)]
    until(lambda: len(painter.batches) == 1)
    assert engine.running == 1
    assert painter.gate is not None
    painter.gate.set()
    for ticket in tickets:
        ticket.result.result(10)
    assert painter.divided == {"job 0": [1], "job 1": [1]}


def test_the_operators_number_of_workers_is_kept_by_the_engine(engine_of: EngineOf) -> None:
    """ENGINE_WORKERS=2: side by side from the first step on, each with half of the cores, also alone."""
    painter = DividedDenoiser(together=threading.Barrier(2), large=True)
    engine = engine_of(painter, workers=2, max_batch=1)
    for ticket in [engine.submit(job(f"job {n}")) for n in range(2)]:
        ticket.result.result(10)
    painter.together = None
    engine.submit(job("alone")).result.result(10)
    assert {number for numbers in painter.divided.values() for number in numbers} == {2}
