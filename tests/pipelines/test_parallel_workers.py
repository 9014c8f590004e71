"""Two workers use the same weights at the same time, and every image equals the one generated alone."""

from __future__ import annotations

from typing import Any

import pytest
from drawing import disc_mask, draw, job_for, psnr, scene
from fakes import until

from stable_diffusion_server.engine import Engine, EngineState

pytestmark = pytest.mark.slow


def test_two_workers_draw_what_one_draws(registry: Any) -> None:
    """Families, tasks, steps and prompts mixed over two threads.

    Each image matches the one generated alone to 45 dB.
    """
    jobs = [
        job_for("sdxl", seed=1, prompt="a green square"),
        job_for("flux", seed=2),
        job_for("sdxl", seed=3, image=scene(), strength=0.5, num_inference_steps=6),
        job_for("flux", seed=4, prompt="a yellow star", num_inference_steps=6),
        job_for("sdxl", seed=5, image=scene(), mask=disc_mask(), scheduler="euler_a"),
        job_for("flux", seed=6, image=scene(), mask=disc_mask()),
        job_for("sdxl", seed=7, prompt="a red circle", refine=True),
        job_for("flux", seed=8, prompt="a red circle"),
    ]
    engine: Engine[Any] = Engine(lambda: registry, queue_limit=16, max_batch=4, workers=2)
    engine.start()
    until(lambda: engine.state is EngineState.READY)
    drawings = [ticket.result.result(120) for ticket in [engine.submit(job) for job in jobs]]
    engine.stop(10)
    for job, drawing in zip(jobs, drawings, strict=True):
        assert psnr(drawing.product.pixels, draw(registry, job)) >= 45
