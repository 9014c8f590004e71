"""Jobs with a second pass: drawn side by side in both passes, and drawn again after a restart in either of them."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass, field
from functools import partial

import pytest
from fakes import Canvas, FakeDenoiser, FakePixels, until
from service_harness import order
from test_job_manager import MakeOffice, office_of

from stable_diffusion_server.jobs.store.records import JobState

pytestmark = pytest.mark.slow
__all__ = ["office_of"]

HIRES = {"hires_scale": 2.0, "hires_upscaler": "latent", "hires_prompt": "a blue square", "num_inference_steps": 4}


@dataclass
class HeldAfter(FakeDenoiser):
    """Closes its gate once it has finished so many pictures."""

    gate: threading.Event | None = field(default_factory=threading.Event)
    passes: int = 0

    def finish(self, state: Canvas) -> FakePixels:
        finished = super().finish(state)
        if len(self.finished) == self.passes and self.gate is not None:
            self.gate.clear()
        return finished


async def test_both_passes_share_steps_with_other_requests(office_of: MakeOffice) -> None:  # the fixture
    """Two jobs are together in steps of the first pass and of the second."""
    held = HeldAfter(passes=2)
    office = await office_of(held, concurrency=2)
    assert held.gate is not None
    jobs = [await office.accepted(order(f"a red square {n}", **HIRES)) for n in range(2)]

    def are_together(word: str, finished: int) -> bool:
        """Whether a step is held with one of them, and the other one is in it or waits for the next."""
        batch = held.batches[-1] if held.batches else []
        there = len(held.finished) == finished and len(batch) + office.engine.waiting == 2
        return there and all(word in prompt for prompt in batch)

    for word, finished in (("red", 0), ("blue", 2)):
        await asyncio.to_thread(until, partial(are_together, word, finished))
        held.gate.set()
    for one in jobs:
        assert (await office.ended(one.id)).state is JobState.DONE
    assert {batch[0].split()[1] for batch in held.batches if len(batch) == 2} == {"red", "blue"}


@pytest.mark.parametrize("passes", [0, 1])
async def test_a_job_is_drawn_again_after_a_restart_in_either_pass(
    office_of: MakeOffice,  # the fixture
    passes: int,
) -> None:
    """From its first pass on; nothing of the first attempt was stored."""
    held = HeldAfter(passes=passes)
    office = await office_of(held)
    if passes:
        assert held.gate is not None
        held.gate.set()
    accepted = await office.accepted(order(**HIRES))
    await asyncio.to_thread(until, lambda: len(held.prepared) == passes + 1)
    again = await office_of(FakeDenoiser())
    done = await again.ended(accepted.id)
    assert (done.state, done.attempts) == (JobState.DONE, 1)
    first, second = again.painter.finished
    assert (first.keeps_latents, second.latents is not None, second.prompt) == (True, True, "a blue square")
