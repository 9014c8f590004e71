"""Samplers × schedules: each draws what the stock pipeline draws with diffusers' scheduler, alone and in a batch."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from drawing import Pixels, disc_mask, draw, draw_together, job_for, largest_difference, psnr, scene
from sampler_cases import ALIGNED, CASES, FLAGS, OWN, SAMPLERS, SCHEDULES, TWO_PASSES

from stable_diffusion_server.pipelines.scheduler_rows import FOR_NOISE, SCHEDULERS
from stable_diffusion_server.pipelines.starting_noise import starting_noise
from stable_diffusion_server.types import DiffusionRequest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    # diffusers' KDPM2 schedulers hand tensors to numpy.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    # The stock call of DPM++ SDE asks for noise a rounding outside of its range.
    pytest.mark.filterwarnings("ignore:Should have t:UserWarning"),
]


def job_with(sampler: str, schedule: str = "", **changes: Any) -> DiffusionRequest:
    """A request of a sampler and a schedule; the table of "Align Your Steps" has ten steps."""
    options = {**dict(changes.pop("sampling", ())), **({"schedule": schedule} if schedule else {})}
    steps = changes.pop("num_inference_steps", 10 if schedule == "ays" else 4)
    return job_for("sdxl", scheduler=sampler, sampling=tuple(options.items()), num_inference_steps=steps, **changes)


def zero_snr_betas(config: Any) -> list[float]:
    """The embedded model's betas for zero terminal SNR; the last level is finite as in diffusers' Euler."""
    betas = rescale_zero_terminal_snr(
        torch.linspace(config.beta_start**0.5, config.beta_end**0.5, config.num_train_timesteps) ** 2
    )
    betas[-1] = 1 - 2**-24 / torch.cumprod(1 - betas, dim=0)[-2]
    rescaled: list[float] = betas.tolist()
    return rescaled


def by_stock(family: Any, sampler: str, schedule: str, job: DiffusionRequest, **further: Any) -> Pixels:
    """What the stock pipeline draws with a scheduler that is made here by hand, `further` configured."""
    case, like = SAMPLERS[sampler], family.pipeline.scheduler
    kind = getattr(diffusers, case.stock)
    known = inspect.signature(kind.__init__).parameters
    options = {**(FLAGS if schedule else {}), **case.options, **SCHEDULES[schedule], **further}
    if "rescale_betas_zero_snr" not in known and sampler not in ("heun", "kdpm2", "kdpm2_a"):
        options["trained_betas"] = zero_snr_betas(like.config)
    scheduler = kind.from_config(like.config, **{name: value for name, value in options.items() if name in known})
    parts = {**family.pipeline.components, "scheduler": scheduler}
    pipeline = diffusers.StableDiffusionXLPipeline(**parts, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    steps = {"timesteps": ALIGNED} if schedule == "ays" else {"num_inference_steps": job.num_inference_steps}
    called = pipeline(
        prompt=job.prompt, guidance_scale=job.guidance_scale, height=job.height, width=job.width, **steps,
        generator=torch.Generator().manual_seed(job.seed),
    )  # fmt: skip
    return np.asarray(called.images[0])


@pytest.mark.parametrize(("sampler", "schedule"), CASES)
def test_a_sampler_draws_as_diffusers_does_and_counts_its_steps(sampler: str, schedule: str, sdxl: Any) -> None:
    """To within 2 of 255; steps are those that were asked for, however many forward passes they take."""
    job = job_with(sampler, schedule)
    state = sdxl.prepare(job)
    counted, passes = [state.index], 0
    while not state.done:
        sdxl.step([state])
        passes += 1
        counted.append(state.index)
        assert state.steps == job.num_inference_steps
    assert counted == sorted(counted)
    assert counted[-1] == job.num_inference_steps
    extra = 1 if sampler == "pndm" else 0
    assert passes == (2 * job.num_inference_steps - 1 if sampler in TWO_PASSES else job.num_inference_steps + extra)
    assert job.passes_per_step == (2 if sampler in TWO_PASSES else 1)
    ours = sdxl.finish(state).pixels
    assert ours.std() > 5, "a flat picture would prove nothing"
    assert largest_difference(ours, by_stock(sdxl, sampler, schedule, job)) <= 2


@pytest.mark.parametrize(
    ("sampler", "order"),
    [("dpm_2m", 1), ("dpm_2m", 3), ("dpm", 1), ("dpm_3m_sde", 2), ("dpm_2s", 3), ("unipc", 3), ("deis", 1)],
)
def test_the_order_of_a_solver_is_that_of_diffusers(sampler: str, order: int, sdxl: Any) -> None:
    """To within 2 of 255; another order is another picture."""
    job = job_with(sampler, sampling=(("solver_order", order),), num_inference_steps=6)
    ours = draw(sdxl, job)
    assert largest_difference(ours, by_stock(sdxl, sampler, "", job, solver_order=order)) <= 2
    assert largest_difference(ours, draw(sdxl, replace(job, sampling=()))) > 2


def test_every_sampler_is_in_the_table() -> None:
    """Those of diffusers have an oracle, the others are counted apart."""
    assert set(FOR_NOISE) == set(SAMPLERS) | set(OWN)
    assert len(CASES) >= 35
    assert {name for name in SCHEDULERS if job_for("sdxl", scheduler=name).passes_per_step == 2} == TWO_PASSES


def test_samplers_of_every_kind_share_one_batch(sdxl: Any) -> None:
    """Each as if it were alone, to 45 dB or better: noise is the request's own, also where it joins late."""
    jobs = [job_with(name, seed=number) for number, name in enumerate(FOR_NOISE)]
    jobs.append(job_with("dpm_sde", "karras", seed=50, image=scene(), strength=0.7))
    jobs.append(job_with("heun", "ddim_uniform", seed=51, image=scene(), mask=disc_mask(), strength=0.8))
    jobs.append(job_with("dpm_2s_a", "karras", seed=52, refine=True))
    alone = [draw(sdxl, job) for job in jobs]
    assert len({job.shape for job in jobs}) == 1
    early = [sdxl.prepare(job) for job in jobs[::2]]
    sdxl.step(early)
    late = [sdxl.prepare(job) for job in jobs[1::2]]
    while waiting := [state for state in [*early, *late] if not state.done]:
        sdxl.step(waiting)
    drawn = {state.request.seed: sdxl.finish(state).pixels for state in [*early, *late]}
    found = {job.scheduler: psnr(drawn[job.seed], image) for job, image in zip(jobs, alone, strict=True)}
    assert min(found.values()) >= 45, found


@pytest.mark.parametrize(
    ("sampler", "options"),
    [
        ("euler", {"s_churn": 5.0}),
        ("euler", {"zero_snr": False}),
        ("euler", {"guidance_rescale": 0.7}),
        ("euler_a", {"eta": 0.4}),
        ("euler_a", {"schedule": "karras"}),
        ("euler_a", {"s_noise": 0.5}),
        ("ddim", {"eta": 1.0}),
        ("tcd", {"eta": 0.8}),
        ("dpm_sde", {"s_noise": 0.5}),
        ("dpm_2s_a", {"eta": 0.3}),
        ("dpm_2s_a", {"schedule": "exponential"}),
        ("er_sde", {"s_noise": 0.3}),
        ("er_sde", {"schedule": "beta"}),
    ],
)
def test_an_option_changes_the_picture(sampler: str, options: dict[str, Any], sdxl: Any) -> None:
    """And the picture of the option is the same again, alone and beside its plain one."""
    plain, changed = job_with(sampler), job_with(sampler, sampling=tuple(options.items()))
    first = draw(sdxl, changed)
    beside, again = draw_together(sdxl, [plain, changed])
    assert psnr(first, beside) < 45
    assert psnr(first, again) >= 45


@pytest.mark.parametrize("sampler", ["dpm_2s_a", "er_sde"])
def test_samplers_of_our_own_give_the_right_distribution(sampler: str, sdxl: Any) -> None:
    """For data of a known normal distribution, whose exact prediction is a formula, samples have its deviation."""
    from stable_diffusion_server.pipelines.loading.schedulers_and_tokenizers import make_scheduler, set_timesteps

    deviation, steps = 0.7, 40
    like = diffusers.EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    scheduler = make_scheduler(SCHEDULERS[sampler], like, (("schedule", "karras"),))
    set_timesteps(scheduler, steps, torch.device("cpu"))
    scheduler.set_begin_index(0)
    generator = torch.Generator().manual_seed(3)
    sample = torch.randn(1, 4, 128, 128, generator=generator) * float(scheduler.init_noise_sigma)
    for number, timestep in enumerate(scheduler.timesteps):
        sigma = scheduler.sigmas[number]
        noise = sample * sigma / (deviation**2 + sigma**2)
        sample, _ = scheduler.step(noise, timestep, sample, generator=generator)
    assert len(scheduler.timesteps) == (2 * steps - 1 if OWN[sampler] == 2 else steps)
    assert abs(float(sample.std()) / deviation - 1) < 0.03


def test_a_subseed_turns_the_noise_towards_its_own(sdxl: Any) -> None:
    """Strength 1 is the picture of the subseed, less is between; the upper half of a seed does not matter."""
    options = {"subseed": 8, "subseed_strength": 1.0}
    seven, eight = job_with("euler"), job_with("euler", seed=8)
    whole = job_with("euler", sampling=tuple(options.items()))
    half = job_with("euler", sampling=(("subseed", 8 + 2**40), ("subseed_strength", 0.5)))
    large = job_with("euler", seed=7 + 2**33)
    pictures = draw_together(sdxl, [seven, eight, whole, half, large])
    assert psnr(pictures[1], pictures[2]) >= 45
    assert psnr(pictures[0], pictures[4]) >= 45
    assert max(psnr(pictures[3], pictures[0]), psnr(pictures[3], pictures[1])) < 45
    assert psnr(draw(sdxl, half), pictures[3]) >= 45


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_noise_between_two_seeds_is_that_of_automatic1111(share: float) -> None:
    """Its formula, written out for one column; the deviation stays 1."""
    job = job_with("euler", sampling=(("subseed", 8), ("subseed_strength", share)))
    found = starting_noise(job, (1, 4, 64, 48), torch.Generator().manual_seed(7), torch.float32)
    one, other = (
        torch.randn(1, 4, 64, 48, generator=torch.Generator().manual_seed(seed))[0, 2, :, 5] for seed in (7, 8)
    )
    angle = torch.acos((one / one.norm()) @ (other / other.norm()))
    expected = (torch.sin((1 - share) * angle) * one + torch.sin(share * angle) * other) / torch.sin(angle)
    assert torch.allclose(found[0, 2, :, 5], expected, atol=1e-5)
    assert abs(float(found.std()) - 1) < 0.02
