"""Samplers of flows: each draws what the stock pipeline draws with diffusers' scheduler, alone and in a batch."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import tiny_families
from drawing import Pixels, draw, draw_together, largest_difference, psnr
from tiny_drawing import stock_call, tiny_request, tiny_row
from tiny_qwen3 import PICTURE

from stable_diffusion_server.pipelines.families.flux import Flux
from stable_diffusion_server.pipelines.families.sd3 import StableDiffusion3
from stable_diffusion_server.types import DiffusionRequest, Task

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

EULER, HEUN = diffusers.FlowMatchEulerDiscreteScheduler, diffusers.FlowMatchHeunDiscreteScheduler
FIXED = {"use_dynamic_shifting": False}
# Sampler, a request's options, the scheduler class of the stock call and what is configured in it.
CASES: list[tuple[str, dict[str, Any], type, dict[str, Any]]] = [
    ("flow_euler", {}, EULER, {}),
    ("flow_euler", {"schedule": "karras"}, EULER, {"use_karras_sigmas": True}),
    ("flow_euler", {"schedule": "exponential"}, EULER, {"use_exponential_sigmas": True}),
    ("flow_euler", {"schedule": "beta"}, EULER, {"use_beta_sigmas": True}),
    ("flow_euler", {"shift": 1.0}, EULER, {"shift": 1.0, **FIXED}),
    ("flow_euler", {"shift": 6.0}, EULER, {"shift": 6.0, **FIXED}),
    ("flow_euler", {"shift": 6.0, "schedule": "beta"}, EULER, {"shift": 6.0, "use_beta_sigmas": True, **FIXED}),
]
# diffusers' Heun knows no spacing and no shift by the size.
HEUN_CASES: list[tuple[str, dict[str, Any], type, dict[str, Any]]] = [
    ("flow_heun", {}, HEUN, {}),
    ("flow_heun", {"shift": 1.0}, HEUN, {"shift": 1.0}),
    ("flow_heun", {"shift": 6.0}, HEUN, {"shift": 6.0}),
]


@pytest.fixture(scope="module")
def families() -> dict[str, Any]:
    """A model whose shift is a number, and one whose shift depends on the size."""
    sd3, flux = tiny_families.build("sd3"), tiny_families.build("flux-dev")
    assert sd3.scheduler.config.shift != 1
    flux.scheduler = EULER.from_config(flux.scheduler.config, use_dynamic_shifting=True)
    return {
        "sd3": StableDiffusion3(sd3, tiny_row("sd3")),
        "flux-dev": Flux(flux, tiny_row("flux", "dev")),
    }


def asked(family: Any, sampler: str, options: dict[str, Any], **changes: Any) -> DiffusionRequest:
    task = Task.IMAGE_TO_IMAGE if "image" in changes else Task.TEXT_TO_IMAGE
    return tiny_request(family.spec, task, scheduler=sampler, sampling=tuple(options.items()), **changes)


def by_stock(family: Any, request: DiffusionRequest, kind: Any, configured: dict[str, Any]) -> Pixels:
    """What the stock pipeline draws with a scheduler that is made here by hand."""
    pipe = family.pipeline
    scheduler = kind.from_config(pipe.scheduler.config, **configured)
    parts = {**pipe.components, "scheduler": scheduler}
    given = {"guidance_scale": request.guidance_scale, "max_sequence_length": family.spec.text_tokens}
    return stock_call(type(pipe)(**parts), request, **given)


@pytest.mark.parametrize(
    ("name", "case"), [*(("sd3", case) for case in [*CASES, *HEUN_CASES]), *(("flux-dev", case) for case in CASES)]
)
def test_a_sampler_draws_as_diffusers_does(name: str, case: Any, families: dict[str, Any]) -> None:
    """To within 2 of 255; an option changes the picture."""
    (sampler, options, kind, configured), family = case, families[name]
    request = asked(family, sampler, options)
    ours = draw(family, request)
    assert ours.std() > 5, "a flat picture would prove nothing"
    assert largest_difference(ours, by_stock(family, request, kind, configured)) <= 2
    if options:
        assert largest_difference(ours, draw(family, asked(family, sampler, {}))) > 2


@pytest.mark.parametrize("name", ["sd3", "flux-dev"])
def test_all_of_them_share_one_batch(name: str, families: dict[str, Any]) -> None:
    """Each as if it were alone, to 45 dB or better; Heun counts steps, not passes."""
    family = families[name]
    jobs = [asked(family, sampler, options, seed=n) for n, (sampler, options, *_) in enumerate([*CASES, *HEUN_CASES])]
    jobs += [asked(family, "flow_heun", {"schedule": one}, seed=20) for one in ("karras", "exponential", "beta")]
    jobs += [asked(family, one, {"shift": 2.5}, seed=30, image=PICTURE, strength=0.6) for one in family.spec.schedulers]
    assert {len(family.prepare(job).shape) for job in jobs} == {len(family.prepare(jobs[0]).shape)}
    for own, job in zip(draw_together(family, jobs), jobs, strict=True):
        assert psnr(own, draw(family, job)) >= 45, job


@pytest.mark.parametrize("options", [{"s_churn": 20.0}, {"s_churn": 20.0, "s_noise": 1.5}])
def test_heun_of_a_flow_churns(options: dict[str, Any], families: dict[str, Any]) -> None:
    """The picture changes with the noise, and is the same again."""
    family = families["sd3"]
    job = asked(family, "flow_heun", options)
    first = draw(family, job)
    assert largest_difference(first, draw(family, asked(family, "flow_heun", {}))) > 2
    assert psnr(first, draw(family, job)) >= 45
