"""Several workers in parallel, execution in phases for offloaded weights, and previews."""

from __future__ import annotations

import threading
from itertools import groupby, pairwise
from typing import Any

import numpy as np
import pytest
from fakes import until
from squares import (
    ConcurrentDenoiser,
    CpuBoundDenoiser,
    EngineOf,
    PreviewingDenoiser,
    RecordingDenoiser,
    job,
    open_gate,
)

from stable_diffusion_server.engine import Engine, EngineState
from stable_diffusion_server.engine.previews import MIN_STEPS_BETWEEN
from stable_diffusion_server.types import EngineEvent


def test_workers_draw_side_by_side_and_prepare_in_turns(engine_of: EngineOf) -> None:
    """Two threads step different jobs at the same time; prepare, which shares a tokenizer, runs one at a time."""
    painter = ConcurrentDenoiser(together=threading.Barrier(2))
    engine = engine_of(painter, workers=2, max_batch=1)
    tickets = [engine.submit(job(f"job {n}")) for n in range(8)]
    for ticket in tickets:
        ticket.result.result(10)
    assert len(painter.threads) == 2
    assert painter.most["prepare"] == 1
    assert painter.lanes_told == [2, 2, 2]  # the first thread also before its warm-up


def test_the_denoiser_says_how_many_workers_are_best_where_nobody_else_does(engine_of: EngineOf) -> None:
    """Without a setting, the denoiser's preferred number of workers runs."""
    painter = ConcurrentDenoiser(together=threading.Barrier(2), best_workers=2)
    engine = engine_of(painter, workers=0, max_batch=1)
    for ticket in [engine.submit(job(f"job {n}")) for n in range(4)]:
        ticket.result.result(10)
    assert len(painter.threads) == 2


@pytest.mark.parametrize(("cpu_threads", "grows"), [(1, True), (2, False), (0, False)])
def test_a_worker_on_one_thread_learns_by_what_the_processor_gave_it(
    engine_of: EngineOf, cpu_threads: int, grows: bool
) -> None:
    """Wall time grows with the batch because other programs run; CPU time stays the same."""
    painter = CpuBoundDenoiser(gate=threading.Event())
    painter.cpu_threads = cpu_threads
    engine = engine_of(painter, max_batch=2, learn=True)
    tickets = [engine.submit(job(f"job {n}")) for n in range(16)]
    open_gate(painter)
    for ticket in tickets:
        ticket.result.result(30)
    later = painter.batches[-8:]
    assert (max(map(len, painter.batches)) == 2 and all(len(batch) == 2 for batch in later[:4])) is grows


def test_workers_are_refused_where_weights_change_while_drawing() -> None:
    """One sentence with the reason, and nothing is accepted."""
    painter = ConcurrentDenoiser(unshareable="the weights travel between memory and device.")
    engine: Engine[Any] = Engine(lambda: painter, queue_limit=1, max_batch=1, workers=2)
    engine.start()
    until(lambda: engine.state is EngineState.FAILED)
    assert engine.reason == "ENGINE_WORKERS=2 is not possible: the weights travel between memory and device."


def test_weights_that_travel_are_used_in_phases(engine_of: EngineOf) -> None:
    """All are prepared, then stepped to the end, then finished, and memory is freed: nothing joins in between."""
    painter = RecordingDenoiser(gate=threading.Event())
    engine = engine_of(painter)
    first = engine.submit(job("first", steps=1, width=128))
    until(lambda: len(painter.batches) == 1)
    tickets = [engine.submit(job(f"job {n}", steps=2 + n)) for n in range(3)]
    open_gate(painter)
    for ticket in (first, *tickets):
        ticket.result.result(10)
    until(lambda: painter.did[-1] == "release")
    assert painter.did[:4] == ["prepare", "step 1", "finish", "release"]
    assert painter.did[4:] == [
        *["prepare"] * 3, *["step 3"] * 2, "step 2", "step 1", *["finish"] * 3, "release"
    ]  # fmt: skip


def test_previews_are_made_for_those_who_want_them(engine_of: EngineOf) -> None:
    """At most every other step, as a small image; requests without previews cost nothing."""
    painter, reported = PreviewingDenoiser(seconds_per_step=0.01), list[EngineEvent]()
    engine = engine_of(painter)
    engine.submit(job("plain", steps=8), watch=lambda event: None).result.result(10)
    assert painter.sketches == 0
    # On a busy machine a preview that waited for a CPU seems too expensive, and the next ones are skipped.
    until(
        lambda: (
            bool(engine.submit(job("watched", steps=8), previews=True, watch=reported.append).result.result(10))
            and any(event.preview is not None for event in reported)
        )
    )
    sketched = [event for event in reported if event.preview is not None]
    assert all(event.preview is not None and np.all(event.preview == event.step) for event in sketched)
    for _, events in groupby(sketched, lambda event: event.job_id):
        assert all(later.step - earlier.step >= MIN_STEPS_BETWEEN for earlier, later in pairwise(events))


def test_previews_that_cost_too_much_are_left_out(engine_of: EngineOf) -> None:
    """Ten times as expensive as a step: after the first, which is measured, there are hardly any in sixty steps."""

    class Slow(PreviewingDenoiser):
        def preview(self, state: Any) -> Any:
            threading.Event().wait(0.02)
            return super().preview(state)

    painter = Slow(seconds_per_step=0.002)
    engine = engine_of(painter)
    for _ in range(3):
        engine.submit(job("watched", steps=20), previews=True, watch=lambda event: None).result.result(10)
    assert 2 <= painter.sketches < 10


def test_a_preview_that_fails_costs_no_picture(engine_of: EngineOf) -> None:
    """The preview is skipped, and the job continues."""

    class Clumsy(PreviewingDenoiser):
        def preview(self, state: Any) -> Any:
            raise RuntimeError("spilt")

    assert engine_of(Clumsy()).submit(job("watched"), previews=True).result.result(10).attempts == 1
