"""Soft masks: equal to differential diffusion written out over the stock pipeline; darker parts change less."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from drawing import Pixels, disc_mask, draw, draw_together, job_for, largest_difference, scene
from test_oracle import pictures_for, stock_arguments, stock_pipeline

from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.generation.layout import lay_out_images
from stable_diffusion_server.generation.limits import RequestLimits
from stable_diffusion_server.generation.resolver import GenerationOptions, resolve_request
from stable_diffusion_server.pipelines.base import InpaintConstraint
from stable_diffusion_server.types import DiffusionRequest, GenerationRequest, ImageArray, ImageInput, MaskMode, Task

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning")]

LEVELS = (0, 70, 128, 190, 255)


def bands(side: int = 128) -> ImageArray:
    """Five grey bands across, from 0 on the left to 255 on the right."""
    columns = np.repeat(np.array(LEVELS, np.uint8), -(-side // 5))[:side]
    return ImageArray(np.broadcast_to(columns, (side, side)).copy())


def soft(model: str, **more: Any) -> DiffusionRequest:
    given = {"image": scene(), "mask": bands(), "soft": True, "num_inference_steps": 8, **more}
    return job_for(model, **given)


def slowly(family: Any, job: DiffusionRequest) -> Pixels:
    """The stock inpaint pipeline over the whole image, and after each step the loop of the paper, pixel by pixel."""
    pipeline = stock_pipeline(family, "StableDiffusionXLInpaintPipeline", job)
    prepare, seen = pipeline.prepare_latents, dict[str, torch.Tensor]()

    def prepared(*args: Any, **more: Any) -> Any:
        made = prepare(*args, **{**more, "return_noise": True, "return_image_latents": True})
        seen["noise"], seen["original"] = made[1], made[2]
        return made

    pipeline.prepare_latents = prepared
    assert job.mask is not None

    def blended(pipe: Any, index: int, timestep: Any, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        latents, count = values["latents"].clone(), pipe.num_timesteps
        steps = pipe.scheduler.timesteps[-count:]
        kept = seen["original"]
        if index + 1 < count:
            kept = pipe.scheduler.add_noise(kept, seen["noise"], steps[index + 1].reshape(1))
        height, width = latents.shape[-2:]
        for y in range(height):
            for x in range(width):
                across, down = job.width // width, job.height // height
                change = job.mask.pixels[y * down, x * across] / 255  # type: ignore[union-attr]  # checked above
                if change == 0 or (index + 1) / count < 1 - change:
                    latents[..., y, x] = kept[..., y, x]
        return {"latents": latents}

    white = replace(job, mask=ImageArray(np.full_like(job.mask.pixels, 255)))
    image = pictures_for("StableDiffusionXLInpaintPipeline", white, _as_pil(job.image))
    generator = torch.Generator().manual_seed(job.seed)
    made = pipeline(**stock_arguments(family, job), **image, generator=generator, callback_on_step_end=blended)
    return np.asarray(made.images[0])


def _as_pil(picture: ImageArray | None) -> Any:
    from PIL import Image

    return None if picture is None else Image.fromarray(picture.pixels)


@pytest.mark.parametrize("more", [{}, {"strength": 0.7}, {"guidance_scale": 1.0, "seed": 3}, {"scheduler": "ddim"}])
def test_a_soft_mask_is_the_slow_loop(more: dict[str, Any], families: dict[str, Any]) -> None:
    """To 2 of 255; the hard mask of the same levels gives another picture."""
    family, job = families["sdxl-4"], soft("sdxl", **more)
    expected = slowly(family, job)
    assert largest_difference(draw(family, job), expected) <= 2
    assert largest_difference(draw(family, replace(job, soft=False)), expected) > 10


@pytest.mark.parametrize("model", ["sdxl", "flux"])
@pytest.mark.parametrize("more", [{}, {"strength": 0.6}, {"refine": True}])
def test_a_black_and_white_mask_is_the_same_soft_and_hard(
    model: str, more: dict[str, Any], families: dict[str, Any]
) -> None:
    """Bit for bit: 0 is kept and 255 is free in every step."""
    job = job_for(model, image=scene(), mask=disc_mask(), **more)
    assert np.array_equal(draw(families[model], job), draw(families[model], replace(job, soft=True)))


@pytest.mark.parametrize("model", ["sdxl", "flux"])
def test_soft_requests_share_passes(model: str, families: dict[str, Any]) -> None:
    """With each other, with hard ones and with text: each as if alone, to 2 of 255."""
    jobs = [soft(model), soft(model, seed=9, strength=0.7), job_for(model), soft(model, soft=False)]
    assert len({job.shape for job in jobs}) == 1
    alone = [draw(families[model], job) for job in jobs]
    together = draw_together(families[model], jobs)
    assert max(largest_difference(*pair) for pair in zip(alone, together, strict=True)) <= 2


@pytest.mark.parametrize("model", ["sdxl", "flux"])
def test_darker_parts_change_less(model: str, families: dict[str, Any]) -> None:
    """The mean change of each band over several seeds does not fall from dark to bright, and grows by much."""
    family, width = families[model], -(-128 // 5)
    kept = draw(family, soft(model, mask=ImageArray(np.full((128, 128), 1, np.uint8)))).astype(int)
    changes = np.zeros(5)
    for seed in range(6):
        made = draw(family, soft(model, seed=seed, prompt="a red square on a black background")).astype(int)
        changes += [np.abs(made - kept)[:, band * width : (band + 1) * width].mean() / 6 for band in range(5)]
    print(f"\n{model}: mean change of 255 by grey level {LEVELS}:", np.round(changes, 1))  # noqa: T201  # the measurement
    assert (np.diff(changes) > -2).all()
    assert changes[4] > 2 * changes[0] + 10


@pytest.mark.parametrize(
    ("level", "done", "free"),
    [(0, 1.0, False), (1, 0.99, False), (1, 1.0, True), (127, 0.5, False), (128, 0.5, True), (255, 0.0, True)],
)
def test_a_level_is_the_share_of_the_passes_that_are_free(level: int, done: float, free: bool) -> None:
    """Both sides of a threshold; 0 is never free."""
    mask = torch.full((1, 1, 1, 1), level / 255)
    assert bool(InpaintConstraint(mask, mask, soft=True).repainted(done)) is free
    assert InpaintConstraint(mask, mask).repainted(done) is mask


def test_the_layout_keeps_the_levels_and_does_not_blend_again() -> None:
    """The model gets the greys; the new image is taken wherever the mask is not black, and there alone."""
    given = ImageInput("image_file", data=b"i")
    asked = GenerationRequest(
        Task.INPAINT, "x", image=given, mask=replace(given, parameter="mask_file"), mask_mode=MaskMode.SOFT
    )
    plan = resolve_request(asked, GenerationOptions(RequestLimits(), "sdxl", "up"))
    mask = np.repeat(bands().pixels[..., None], 3, axis=2)
    laid = lay_out_images(plan, scene().pixels, mask)
    assert laid.request.soft
    assert laid.request.mask is not None
    assert len(np.unique(laid.request.mask.pixels)) == 5
    drawn = np.full((128, 128, 3), 9, np.uint8)
    made = laid.compose_output(drawn)
    assert (made[:, 26:] == 9).all()
    assert (made[:, :26] == scene().pixels[:, :26]).all()


def test_a_model_that_takes_the_mask_as_an_input_refuses_levels(sdxl: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Named by the parameter, when it is prepared."""
    state = sdxl._state_of
    monkeypatch.setattr(sdxl, "_state_of", lambda *args: _without_constraint(state(*args)))
    with pytest.raises(InvalidInput) as refused:
        sdxl.prepare(soft("sdxl"))
    assert refused.value.field == "mask_mode"


def _without_constraint(state: Any) -> Any:
    state.inpaint = None
    return state
