"""Batch size tuner: batches grow while that pays and shrink when it does not, by measured step times."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from squares import job

from stable_diffusion_server.engine import Ticket
from stable_diffusion_server.engine.batch_tuner import PATIENCE, RECOVERY_STEPS, RETEST_STEPS, BatchSizeTuner

SQUARE = job("square")


def step(tuner: BatchSizeTuner, times: int, seconds: Callable[[int], float]) -> list[int]:
    """Record steps of full batches with requests waiting; return the cap after each."""
    caps = []
    for _ in range(times):
        size = tuner.cap(SQUARE)
        caps.append(size)
        tuner.record_step(SQUARE, size, seconds(size), seconds(size), more_wait=True)
    return caps


def test_a_cap_grows_while_a_picture_takes_less_time_in_a_larger_group() -> None:
    """A step takes as long for eight as for one: from one to the maximum within a few steps."""
    tuner = BatchSizeTuner(8, learn=True)
    assert tuner.cap(SQUARE) == 1
    caps = step(tuner, 30, lambda size: 1.0)
    assert sorted(set(caps)) == [1, 2, 4, 8]
    assert tuner.cap(SQUARE) == 8


def test_a_cap_goes_no_further_than_it_pays() -> None:
    """Up to four are nearly free, eight take three times as long: it settles at four and rarely retries."""
    tuner = BatchSizeTuner(8, learn=True)
    caps = step(tuner, 1000, lambda size: 1.0 if size <= 4 else 3.0)
    assert caps[-1] == 4
    assert caps.count(8) < 0.05 * len(caps)


def test_where_batching_does_not_pay_it_stays_at_one() -> None:
    """Twice the work takes twice the time: two are tried now and then, and that is all."""
    tuner = BatchSizeTuner(4, learn=True)
    caps = step(tuner, 1000, lambda size: 1.0 * size)
    assert caps.count(1) > 0.95 * len(caps)


def test_a_cap_shrinks_when_it_pays_no_more() -> None:
    """A batch size that paid before is re-tested, and given up."""
    tuner = BatchSizeTuner(4, learn=True)
    step(tuner, 40, lambda size: 1.0)
    assert tuner.cap(SQUARE) == 4
    step(tuner, 3 * RETEST_STEPS + PATIENCE, lambda size: float(size) ** 1.2)
    assert tuner.cap(SQUARE) == 1


def test_what_other_programs_take_of_the_time_teaches_nothing() -> None:
    """CPU time per image falls with the batch size, so the cap grows.

    Although other programs make the wall time rise.
    """
    tuner = BatchSizeTuner(4, learn=True)
    for _ in range(60):
        size = tuner.cap(SQUARE)
        tuner.record_step(SQUARE, size, 2.0**size, 1.0, more_wait=True)
    assert tuner.cap(SQUARE) == 4
    assert tuner.seconds_for(SQUARE, 1, 4) == 16.0


def test_the_most_is_never_exceeded_and_memory_bounds_it_for_long() -> None:
    """A MAX_BATCH that is no power of two is reached and not exceeded; after out-of-memory the maximum is lower."""
    tuner = BatchSizeTuner(6, learn=True)
    assert max(step(tuner, 100, lambda size: 1.0)) == 6
    tuner.record_out_of_memory(SQUARE, 6)
    assert max(step(tuner, 1000, lambda size: 1.0)) == 3


def test_memory_that_was_short_once_is_tried_again_much_later() -> None:
    """Another program may have ended: the next size is allowed after thousands of good steps, and not before."""
    tuner = BatchSizeTuner(8)
    tuner.record_out_of_memory(SQUARE, 8)
    caps = step(tuner, 3 * RECOVERY_STEPS, lambda size: 1.0)
    assert caps[: 2 * RECOVERY_STEPS - 1] == [4] * (2 * RECOVERY_STEPS - 1)
    assert caps[-1] == 8


def test_a_lone_job_changes_nothing() -> None:
    """Without waiting requests there is nothing to tune."""
    tuner = BatchSizeTuner(4, learn=True)
    for _ in range(100):
        tuner.record_step(SQUARE, 1, 1.0, 1.0, more_wait=False)
    assert tuner.cap(SQUARE) == 1


def test_the_time_left_is_that_of_those_before_and_ones_own() -> None:
    """Unknown before any measurement; then steps × seconds, in batches as large as allowed."""
    tuner = BatchSizeTuner(2)
    line = [Ticket[object](SQUARE), Ticket[object](SQUARE)]
    assert tuner.etas(line, []) == [None, None]
    for _ in range(2):
        tuner.record_step(SQUARE, 2, 0.5, 0.5, more_wait=False)
    assert tuner.etas(line, []) == [2.0, 3.0]
    assert tuner.seconds_for(SQUARE, 3) == 1.5


def test_a_shape_that_was_not_measured_is_reckoned_by_its_pixels() -> None:
    """Estimated from another shape of its model: twice the pixels take twice as long."""
    tuner = BatchSizeTuner(1)
    for _ in range(2):
        tuner.record_step(SQUARE, 1, 0.5, 0.5, more_wait=False)
    assert tuner.etas([Ticket[object](job("wide", width=128))], []) == [4.0]
    assert tuner.seconds_for(replace(SQUARE, model="flux"), 4) is None


def test_figures_are_one_for_each_label() -> None:
    """LoRAs make neither shapes of their own nor labels: they share passes, and nobody can fill the metrics."""
    tuner = BatchSizeTuner(4)
    for loras in ((), (("a", 1.0),), (("b", 1.0),)):
        for _ in range(2):
            tuner.record_step(job("square", loras=loras), 2, 0.25, 0.25, more_wait=False)
    assert [figure.label for figure in tuner.step_timings()] == ["sdxl 64x64"]
    assert tuner.step_timings()[0].step_seconds == {2: 0.25}


def test_memory_caps_batches_whatever_is_faster() -> None:
    """The placement of a model has room for so many of a size; the cap follows it at once, also in the estimates."""
    tuner = BatchSizeTuner(8)
    assert tuner.cap(job("a square")) == 8
    tuner.memory_limit = lambda request: 3
    assert tuner.cap(job("a square")) == 3
    tuner.memory_limit = lambda request: 99
    assert tuner.cap(job("a square")) == 8
