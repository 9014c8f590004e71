"""Request queue: shapes, owners and priority classes take turns, and nobody starves."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

from fakes import FakeDenoiser, until
from squares import EngineOf, job, open_gate

from stable_diffusion_server.engine import Ticket
from stable_diffusion_server.engine.request_queue import BACKGROUND_EVERY, RequestQueue
from stable_diffusion_server.engine.worker import BACKGROUND_TIME_SLICE, TIME_SLICE
from stable_diffusion_server.types import EngineEventKind


def first_and_last(painter: FakeDenoiser, prompt: str) -> tuple[int, int]:
    """Numbers of a job's first and last step among all steps of the device, from 1."""
    numbers = [number for number, batch in enumerate(painter.batches, 1) if prompt in batch]
    return numbers[0], numbers[-1]


def test_two_unlike_jobs_end_one_after_the_other(engine_of: EngineOf, gated: FakeDenoiser) -> None:
    """Four steps each: they end at 4 and 8, not interleaved at 7 and 8."""
    engine = engine_of(gated)
    tickets = [engine.submit(job("square")), engine.submit(job("wide", width=128))]
    open_gate(gated)
    for ticket in tickets:
        ticket.result.result(10)
    assert (first_and_last(gated, "square"), first_and_last(gated, "wide")) == ((1, 4), (5, 8))


def test_a_long_job_lets_another_shape_have_its_turn(engine_of: EngineOf, gated: FakeDenoiser) -> None:
    """Another shape waits for a bounded number of steps, and the long job resumes where it was."""
    engine = engine_of(gated)
    long = engine.submit(job("long", steps=100))
    until(lambda: len(gated.batches) == 1)
    short = engine.submit(job("short", width=128))
    open_gate(gated)
    short.result.result(10)
    assert long.result.result(10).attempts == 1
    assert first_and_last(gated, "short")[1] <= 1 + TIME_SLICE + 4
    assert sum("long" in batch for batch in gated.batches) == 100


def test_equal_shapes_that_keep_coming_do_not_starve_another(engine_of: EngineOf, gated: FakeDenoiser) -> None:
    """With thirty squares before and after it, a wide one waits only for the current batch."""
    engine = engine_of(gated, queue_limit=64)
    before = [engine.submit(job(f"before {n}")) for n in range(4)]
    until(lambda: engine.running > 0)
    wide = engine.submit(job("wide", width=128))
    after = [engine.submit(job(f"after {n}")) for n in range(30)]
    open_gate(gated)
    for ticket in (*before, wide, *after):
        ticket.result.result(10)
    assert first_and_last(gated, "wide")[1] <= 1 + 4 + 4


def test_owners_share_the_device_whoever_floods_it(engine_of: EngineOf, gated: FakeDenoiser) -> None:
    """Against 300 jobs of one owner, a later owner with 60 gets at least 45 % of the steps until they end."""
    for side in (64, 32):  # of the same shape, and of another that costs as much
        engine = engine_of(gated, queue_limit=400)
        assert gated.gate is not None
        gated.gate.clear()
        gated.batches.clear()
        flood = [engine.submit(job(f"flood {n}"), owner="flood") for n in range(300)]
        mine = [
            engine.submit(replace(job(f"mine {n}", width=side), height=4096 // side), owner="mine") for n in range(60)
        ]
        open_gate(gated)
        for ticket in mine:
            ticket.result.result(30)
        end = max(number for number, batch in enumerate(gated.batches) if any("mine" in name for name in batch))
        steps = [name.split()[0] for batch in gated.batches[: end + 1] for name in batch]
        assert steps.count("mine") / len(steps) >= 0.45
        for ticket in flood:
            ticket.result.cancel()


def test_an_owner_who_was_away_has_nothing_saved_up() -> None:
    """After ten jobs of one owner a newcomer alternates with it, and does not get ten in a row."""
    line: RequestQueue[Any] = RequestQueue()
    for n in range(10):
        line.add(ticket := Ticket(job(f"early {n}"), owner="early"))
        line.take(ticket)
    for n in range(3):
        line.add(Ticket(job(f"early {n}"), owner="early"))
        line.add(Ticket(job(f"late {n}"), owner="late"))
    order = [place.ticket.owner for place in line.in_order()]
    assert sorted(order[:2]) == sorted(order[2:4]) == ["early", "late"]


def test_dear_jobs_take_more_of_a_turn_than_cheap_ones() -> None:
    """Owners share steps × pixels, so one job of 40 steps weighs as much as ten of four."""
    line: RequestQueue[Any] = RequestQueue()
    for n in range(3):
        line.add(Ticket(job(f"dear {n}", steps=40), owner="dear"))
    for n in range(30):
        line.add(Ticket(job(f"cheap {n}"), owner="cheap"))
    order = [place.ticket.owner for place in line.in_order()]
    assert [order[:11].count("dear"), order[:22].count("dear")] == [1, 2]


def test_interactive_work_goes_before_background_work(engine_of: EngineOf, gated: FakeDenoiser) -> None:
    """Interactive requests overtake background ones, but background work also gets its turn."""
    engine = engine_of(gated, max_batch=1, queue_limit=64)
    running = engine.submit(job("running"))
    until(lambda: engine.running == 1)
    late = [engine.submit(job(f"late {n}"), background=True) for n in range(2)]
    now = [engine.submit(job(f"now {n}")) for n in range(20)]
    open_gate(gated)
    for ticket in (running, *late, *now):
        ticket.result.result(10)
    order = [
        prompt for prompt, following in pairwise([*(batch[0] for batch in gated.batches), ""]) if following != prompt
    ]
    assert order.index("late 0") == 1 + BACKGROUND_EVERY
    assert order.index("late 1") == 1 + 2 * BACKGROUND_EVERY + 1


def test_background_work_yields_to_interactive_work(engine_of: EngineOf, gated: FakeDenoiser) -> None:
    """A long background job is preempted after a few steps, and resumes later."""
    engine = engine_of(gated, max_batch=1)
    late = engine.submit(job("late", steps=60), background=True)
    until(lambda: len(gated.batches) == 1)
    now = engine.submit(job("now"))
    open_gate(gated)
    now.result.result(10)
    late.result.result(10)
    assert first_and_last(gated, "now")[1] <= 1 + BACKGROUND_TIME_SLICE + 4
    assert sum("late" in batch for batch in gated.batches) == 60


def test_one_owners_long_job_lets_another_owner_in(engine_of: EngineOf, gated: FakeDenoiser) -> None:
    """Also for equal shapes, when one owner's jobs fill the batch."""
    engine = engine_of(gated, max_batch=1)
    long = engine.submit(job("long", steps=100), owner="a")
    until(lambda: len(gated.batches) == 1)
    other = engine.submit(job("other"), owner="b")
    open_gate(gated)
    other.result.result(10)
    assert first_and_last(gated, "other")[1] <= 1 + TIME_SLICE + 4
    assert long.result.result(10).attempts == 1


def test_position_and_remaining_time_are_reported_to_who_watches(engine_of: EngineOf, gated: FakeDenoiser) -> None:
    """The position falls to zero, steps count up, and the time left is known once the shape was measured."""
    engine = engine_of(gated, max_batch=1)
    open_gate(gated)
    for _ in range(2):
        engine.submit(job("measured", steps=8)).result.result(10)
    assert gated.gate is not None
    gated.gate.clear()
    reported: list[Any] = []
    tickets = [engine.submit(job(f"job {n}"), watch=reported.append if n == 2 else None) for n in range(3)]
    open_gate(gated)
    for ticket in tickets:
        ticket.result.result(10)
    until(lambda: reported[-1].kind is EngineEventKind.DONE)
    places = [event.position for event in reported if event.kind is EngineEventKind.QUEUED]
    assert places == sorted(places, reverse=True)
    assert places[-1] == 1
    assert [event.step for event in reported if event.kind is EngineEventKind.STEP] == [1, 2, 3, 4]
    assert all(event.position == 0 for event in reported if event.kind is EngineEventKind.STEP)
    assert all(event.eta_seconds is not None and event.eta_seconds >= 0 for event in reported if event.kind != "done")
