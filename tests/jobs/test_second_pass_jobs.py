"""Jobs with a second pass: drawn side by side in both passes, and drawn again after a restart in either of them."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass, field

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
    """Two jobs are together in each step of the first pass and of the second."""
    office = await office_of(FakeDenoiser(gate=threading.Event()), concurrency=2)
    jobs = [await office.accepted(order(f"a red square {n}", **HIRES)) for n in range(2)]
    await asyncio.to_thread(until, lambda: bool(office.painter.batches))
    await asyncio.sleep(0.3)  # for the other one to be queued
    office.painter.gate.set()
    for one in jobs:
        assert (await office.ended(one.id)).state is JobState.DONE
    pairs = [batch for batch in office.painter.batches if len(batch) == 2]
    assert sum(batch == ["a blue square"] * 2 for batch in pairs) >= 2
    assert sum("red" in batch[0] for batch in pairs) >= 2


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
