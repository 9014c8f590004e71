"""Hundreds of jobs that join, leave, fail and are cancelled at random: no image is swapped, and none is lost."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from fakes import Canvas, FakeDenoiser, FakePixels, until
from squares import EngineOf, job

from stable_diffusion_server.engine import EngineState, Ticket
from stable_diffusion_server.errors import OutOfMemory
from stable_diffusion_server.types import EngineEvent, EngineEventKind

pytestmark = pytest.mark.slow

JOBS = 500


@dataclass
class Stepwise(FakeDenoiser):
    """Each step adds the job's seed to its canvas, so an extra, missing or foreign step is visible.

    Memory fits six canvases, and now and then only one.
    """

    resident: bool = True
    chance: random.Random = field(default_factory=lambda: random.Random(1))  # noqa: S311  # no secret
    sums: dict[int, int] = field(default_factory=dict)
    groups: set[int] = field(default_factory=set)

    def prepare(self, job: Any) -> Canvas:
        canvas = super().prepare(job)
        self.sums[id(canvas)] = 0
        return canvas

    def step(self, states: Sequence[Canvas]) -> None:
        assert len({state.shape for state in states}) == 1
        if len(states) > (6 if self.chance.random() > 0.02 else 1):
            raise OutOfMemory("no memory")
        super().step(states)
        self.groups.add(len(states))
        for state in states:
            self.sums[id(state)] += state.job.seed

    def finish(self, state: Canvas) -> FakePixels:
        total = self.sums.pop(id(state))
        return FakePixels(np.frombuffer(np.int64(total).tobytes(), np.uint8).copy())


def total_of(ticket: Ticket[FakePixels]) -> int:
    """Sum of a job's steps."""
    return int(ticket.result.result(0).product.pixels.view(np.int64)[0])


@pytest.mark.parametrize(
    ("workers", "resident", "seed"), [(1, True, 1), (1, True, 2), (2, True, 3), (3, True, 4), (1, False, 5)]
)
def test_whatever_happens_every_job_gets_its_own_answer(
    workers: int, resident: bool, seed: int, engine_of: EngineOf
) -> None:
    """Random shapes, steps, owners, classes, cancellations, failures and out-of-memory: each image is its own job's."""
    chance = random.Random(seed)  # noqa: S311  # no secret
    reported: dict[str, list[EngineEvent]] = {}
    painter = Stepwise(resident=resident, seconds_per_step=0.0002)
    engine = engine_of(
        painter,
        queue_limit=JOBS,
        max_batch=8,
        workers=workers,
        observe=lambda event: reported.setdefault(event.job_id, []).append(event),
    )
    tickets: list[Ticket[FakePixels]] = []
    for number in range(JOBS):
        culprit = chance.random() < 0.03
        wanted = job(
            "unsteppable" if culprit else f"job {number}",
            steps=chance.choice([1, 2, 3, 4, 8, 50]),
            width=chance.choice([64, 64, 64, 128, 256]),
        )
        object.__setattr__(wanted, "seed", 1000 + number)
        tickets.append(engine.submit(wanted, owner=chance.choice(["", "a", "b"]), background=chance.random() < 0.2))
        if chance.random() < 0.15:
            victim = chance.choice(tickets)
            threading.Timer(chance.random() * 0.2, victim.result.cancel).start()
        if chance.random() < 0.05:
            time.sleep(0.005)
    until(lambda: all(ticket.result.done() for ticket in tickets), 60)
    until(lambda: engine.running == engine.waiting == 0)
    assert engine.state is EngineState.READY
    ends = {EngineEventKind.DONE, EngineEventKind.FAILED, EngineEventKind.CANCELLED}
    for ticket in tickets:
        wanted = ticket.request
        try:
            assert total_of(ticket) == wanted.seed * wanted.num_inference_steps
            assert wanted.prompt != "unsteppable"
        except CancelledError:
            pass
        except RuntimeError as error:
            assert (wanted.prompt, str(error)) == ("unsteppable", "cannot step this")  # noqa: PT017  # one of three ends
        until(lambda: reported[ticket.id][-1].kind in ends)  # noqa: B023  # called at once
        assert sum(event.kind in ends for event in reported[ticket.id]) == 1
    assert max(painter.groups) > 1
    assert engine.submit(job("the next")).result.result(10).attempts == 1
