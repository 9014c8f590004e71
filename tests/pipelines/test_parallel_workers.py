"""Workers use the same weights at the same time, on shares of the cores, and images equal those generated alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from drawing import MODELS_DIR, disc_mask, draw, job_for, largest_difference, psnr, scene
from fakes import until

from stable_diffusion_server.engine import Engine, EngineState
from stable_diffusion_server.pipelines.catalog import MODELS
from stable_diffusion_server.pipelines.registry import LoadOptions, Registry, load

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


@pytest.fixture
def two_cores() -> Iterator[Registry]:
    """The embedded SDXL on two threads."""
    before = torch.get_num_threads()
    yield load(MODELS_DIR, "cpu", 2, LoadOptions(models={"sdxl": MODELS["sdxl"]}, performance="safe"))
    torch.set_num_threads(before)


def test_the_division_of_the_cores_changes_rounding_only(two_cores: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """All cores for one request, or half of them each: the largest difference is 1 of 255."""
    jobs = [job_for("sdxl", seed=seed, num_inference_steps=2) for seed in (1, 2)]
    used: list[int] = []
    step = two_cores.step

    def note_and_step(states: Any) -> None:
        used.append(torch.get_num_threads())
        step(states)

    monkeypatch.setattr(two_cores, "step", note_and_step)
    drawn = []
    for workers, large in ((0, True), (0, False), (2, True)):
        # As if the embedded model were large; the machine's cores are real.
        monkeypatch.setattr(two_cores, "is_large", lambda model, large=large: large)
        engine: Engine[Any] = Engine(lambda: two_cores, queue_limit=4, max_batch=1, workers=workers)
        engine.start()
        until(lambda engine=engine: engine.state is EngineState.READY)
        used.clear()
        drawn.append([engine.submit(job).result.result(120).product.pixels for job in jobs])
        engine.stop(10)
        assert {*used} == {2 if large and workers == 0 else 1}
    for others in drawn[1:]:
        assert all(largest_difference(*pair) <= 1 for pair in zip(drawn[0], others, strict=True))
