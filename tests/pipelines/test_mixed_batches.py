"""Jobs of different tasks share a batch without affecting one another."""

from __future__ import annotations

from typing import Any

import pytest
from drawing import disc_mask, draw, draw_together, job_for, largest_difference, outline, psnr, scene

from stable_diffusion_server.types import DiffusionRequest

pytestmark = pytest.mark.slow

SDXL_JOBS = {
    "text": job_for("sdxl", seed=1),
    "text, no guidance, 7 steps": job_for("sdxl", seed=2, guidance_scale=1.0, num_inference_steps=7),
    "text, ddim, refined": job_for("sdxl", seed=3, scheduler="ddim", num_inference_steps=6, refine=True),
    "image": job_for("sdxl", seed=4, image=scene(), strength=0.5, guidance_scale=3.5),
    "inpaint, ancestral": job_for("sdxl", seed=5, image=scene(), mask=disc_mask(), scheduler="euler_a"),
    "inpaint, refined": job_for("sdxl", seed=6, image=scene(), mask=disc_mask(), strength=0.9, refine=True),
    "edges": job_for("sdxl", seed=7, control=outline(), control_scale=0.9),
    "image + edges": job_for("sdxl", seed=8, image=scene(), strength=0.7, control=outline(), control_scale=0.4),
}
FLUX_JOBS = {
    "text": job_for("flux", seed=1),
    "text, 7 steps, refined": job_for("flux", seed=2, num_inference_steps=7, refine=True),
    "image": job_for("flux", seed=3, image=scene(), strength=0.5),
    "inpaint": job_for("flux", seed=4, image=scene(), mask=disc_mask(), num_inference_steps=5),
    "edges": job_for("flux", seed=5, control=outline(), control_scale=0.6),
    "image + edges": job_for("flux", seed=6, image=scene(), strength=0.7, control=outline(), control_scale=0.3),
}


@pytest.mark.parametrize(("family", "jobs"), [("sdxl", SDXL_JOBS), ("flux", FLUX_JOBS)])
def test_a_batch_of_every_task_draws_each_as_if_it_were_alone(
    family: str, jobs: dict[str, DiffusionRequest], families: dict[str, Any]
) -> None:
    """Tasks, steps, guidance, strengths, schedulers and edges differ within one forward pass, to 45 dB or better."""
    alone = [draw(families[family], job) for job in jobs.values()]
    together = draw_together(families[family], list(jobs.values()))
    print(f"\n| {family}, one batch of {len(jobs)} | PSNR in dB | largest difference |\n| --- | --- | --- |")  # noqa: T201  # the table
    for name, single, mixed in zip(jobs, alone, together, strict=True):
        print(f"| {name} | {psnr(single, mixed):.1f} | {largest_difference(single, mixed)} |")  # noqa: T201  # the table
    assert all(psnr(single, mixed) >= 45 for single, mixed in zip(alone, together, strict=True))


def test_a_job_may_join_a_batch_that_is_under_way(sdxl: Any) -> None:
    """A state that starts two steps late gives the same image."""
    early, late = job_for("sdxl", seed=1, num_inference_steps=6), job_for("sdxl", seed=4, image=scene(), strength=0.5)
    first = sdxl.prepare(early)
    sdxl.step([first])
    sdxl.step([first])
    second = sdxl.prepare(late)
    while waiting := [state for state in (first, second) if not state.done]:
        sdxl.step(waiting)
    for state in (first, second):
        assert psnr(sdxl.finish(state).pixels, draw(sdxl, state.request)) >= 45


def test_all_these_jobs_share_one_shape() -> None:
    """The engine may batch them: none of the differences is part of the shape."""
    assert len({job.shape for job in SDXL_JOBS.values()}) == 1
    assert len({job.shape for job in FLUX_JOBS.values()}) == 1


@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_edges_matter_to_the_guided_row_alone(family: str, families: dict[str, Any]) -> None:
    """Edges change the guided row's image; an unguided row beside it is unchanged."""
    plain, guided = job_for(family, seed=1), job_for(family, seed=1, control=outline(), control_scale=1.0)
    with_mate, beside = draw_together(families[family], [guided, plain])
    alone = draw(families[family], plain)
    assert psnr(beside, alone) >= 45
    assert psnr(with_mate, alone) < 45


@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_the_number_of_steps_is_known_from_the_start(family: str, families: dict[str, Any]) -> None:
    """All steps of a refined job are counted before the first one, and none is added."""
    state = families[family].prepare(job_for(family, refine=True))
    promised = state.steps
    while not state.done:
        families[family].step([state])
        assert state.steps == promised
    assert state.index == promised > 4


@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_outside_the_mask_the_latents_end_as_they_began(family: str, families: dict[str, Any]) -> None:
    """Inpainting preserves the rest exactly, also through a refining second pass."""
    job = job_for(family, image=scene(), mask=disc_mask(), refine=True)
    state = families[family].prepare(job)
    assert state.inpaint is not None
    before, mask = state.inpaint.latents.clone(), state.inpaint.mask.clone()
    while not state.done:
        families[family].step([state])
    kept = (mask == 0).expand_as(before)
    assert kept.any()
    assert (state.latents[kept] == before[kept]).all()
    assert (state.latents[~kept] != before[~kept]).any()
