"""An extended image is what the stock inpaint pipelines draw for its canvas and mask, and goes on from its border."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from drawing import PROMPT, draw, job_for, largest_difference
from test_oracle import Case, draw_by_stock

from stable_diffusion_server.generation.layout import lay_out_images
from stable_diffusion_server.generation.limits import RequestLimits
from stable_diffusion_server.generation.resolver import GenerationOptions, resolve_request
from stable_diffusion_server.types import Extension, GenerationRequest, ImageArray, ImageInput, Task

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning")]

OPTIONS = GenerationOptions(RequestLimits(), "sdxl", "up")
SIDES = Extension(left=40, right=24, bottom=50)
BLUE = np.array((45, 85, 210))


def half_disc() -> np.ndarray:
    """The left part of a red disc on blue, 88 × 100: it is cut off at the right border."""
    y, x = np.mgrid[:100, :88]
    inside = (x - 88) ** 2 + (y - 50) ** 2 < 30**2
    return np.where(inside[..., None], (215, 40, 40), BLUE).astype(np.uint8)


def request(model: str, extension: Extension, **more: Any) -> GenerationRequest:
    image = ImageInput("image_file", data=b"image")
    return GenerationRequest(Task.INPAINT, PROMPT, model=model, seed=7, image=image, extend=extension, **more)


@pytest.mark.parametrize(
    ("family", "stock"), [("sdxl-4", "StableDiffusionXLInpaintPipeline"), ("flux", "FluxInpaintPipeline")]
)
def test_an_extended_image_is_drawn_as_by_the_stock_pipeline(family: str, stock: str, families: dict[str, Any]) -> None:
    """Canvas and mask are built here by hand: 152 × 150 in the middle of 192 × 192, new cells of 16 pixels masked."""
    image, model = half_disc(), family.partition("-")[0]
    plan = resolve_request(request(model, SIDES), OPTIONS)
    laid = lay_out_images(plan, image)
    job = laid.request
    assert (laid.width, laid.height, job.width, job.height) == (152, 150, 192, 192)
    top, left = (192 - 150) // 2, (192 - 152) // 2
    canvas = np.pad(image, [(top, 192 - 100 - top), (left + 40, 192 - 88 - 40 - left), (0, 0)], mode="edge")
    mask = np.zeros((192, 192), np.uint8)
    mask[top : top + 150, left : left + 152] = 255
    mask[top : top + 100, left + 40 : left + 128] = 0
    for y in range(0, 192, 16):
        for x in range(0, 192, 16):
            if mask[y : y + 16, x : x + 16].any():
                mask[y : y + 16, x : x + 16] = 255
    by_hand = job_for(
        model, width=192, height=192, image=ImageArray(canvas), mask=ImageArray(mask), strength=1.0, seed=7
    )
    expected = draw_by_stock(families[family], Case("", family, stock), by_hand)
    assert largest_difference(draw(families[family], job), expected) <= 2


def test_the_new_part_goes_on_from_the_old_one(sdxl: Any) -> None:
    """The embedded model ends the cut-off disc beyond the border, on the same blue; the old part is exact."""
    image = half_disc()
    plan = resolve_request(request("sdxl", Extension(right=88), num_inference_steps=20), OPTIONS)
    laid = lay_out_images(plan, image)
    made = laid.compose_output(draw(sdxl, laid.request))
    assert (made[:, :88] == image).all()
    new = made[:, 88:].astype(int)
    red = (new[..., 0] > new[..., 2] + 60) & (new[..., 0] > new[..., 1] + 60)
    assert red[30:70, :16].mean() > 0.5
    assert np.abs(new[:12, -24:] - BLUE).mean() < 30
