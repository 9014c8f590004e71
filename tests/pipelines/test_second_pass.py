"""Both passes of a request, against chains of stock calls that are written by hand: Lanczos, a network, latents."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from drawing import MODELS_DIR, PROMPT, Pixels, largest_difference
from PIL import Image
from test_oracle import stock_pipeline
from torch.nn import functional

from stable_diffusion_server.generation.executor import SubmissionContext
from stable_diffusion_server.generation.interfaces import ChosenUpscaler
from stable_diffusion_server.generation.layout import lay_out_images
from stable_diffusion_server.generation.limits import RequestLimits
from stable_diffusion_server.generation.quality import CheckedImage
from stable_diffusion_server.generation.resolver import GenerationOptions, resolve_request
from stable_diffusion_server.generation.second_pass import draw_passes
from stable_diffusion_server.generation.single_flight import CallbackListener
from stable_diffusion_server.pipelines.upscaling.upscaler import NetworkUpscaler
from stable_diffusion_server.pipelines.upscaling.upscaler_files import UpscalerFile
from stable_diffusion_server.types import Caller, DiffusionRequest, GenerationProgress, GenerationRequest, Task

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning")]

SIDE, LARGE = 256, 384
EMBEDDED = UpscalerFile("embedded-2x", MODELS_DIR / "embedded-upscaler" / "embedded-2x.safetensors", "1a")
REQUEST = GenerationRequest(
    Task.TEXT_TO_IMAGE,
    PROMPT,
    SIDE,
    SIDE,
    seed=7,
    num_inference_steps=4,
    scheduler="euler",
    hires_width=LARGE,
    hires_height=LARGE,
    hires_steps=5,
    hires_strength=0.6,
)
OWN = {
    "hires_prompt": "a green square on a yellow background",
    "hires_negative_prompt": "red",
    "hires_guidance": 3.0,
    "hires_scheduler": "ddim",
}


@dataclass
class DirectExecutor:
    """Draws requests with a family, each alone, without an engine."""

    family: Any
    drawn: list[DiffusionRequest] = field(default_factory=list)
    max_side = 2048

    def fit_prompts(self, request: DiffusionRequest, resolved: Any) -> DiffusionRequest:
        return request

    async def generate(self, request: DiffusionRequest, context: Any, listener: Any) -> tuple[Any, bool]:
        self.drawn.append(request)
        state = self.family.prepare(request)
        while not state.done:
            self.family.step([state])
            listener.on_progress(GenerationProgress("step", state.index, state.steps))  # type: ignore[arg-type]  # a stand-in
        return CheckedImage(request, self.family.finish(state), {"steps": 1.0}, ()), False


class EmbeddedUpscaler:
    """The embedded network by its name."""

    def factors(self) -> dict[str, float]:
        return {"embedded-2x": 2.0}

    def find(self, name: str, field: str) -> ChosenUpscaler:
        return ChosenUpscaler("embedded-2x", "1a")

    def enlarge(self, name: str, pixels: Pixels, width: int, height: int, report: Any) -> Pixels:
        assert name == "embedded-2x"
        enlarged: Pixels = NetworkUpscaler("cpu").enlarge(EMBEDDED, pixels, width, height, report)
        return enlarged


def both_passes(family: Any, **changes: Any) -> tuple[Pixels, list[DiffusionRequest], list[tuple[int, int]]]:
    """The picture, the requests of both passes, and the reported progress."""
    upscaler, reports = EmbeddedUpscaler(), list[tuple[int, int]]()
    options = GenerationOptions(RequestLimits(), "sdxl", "up", models={"sdxl": family.spec}, upscaler=upscaler)
    resolved = resolve_request(replace(REQUEST, **changes), options)
    layout, executor = lay_out_images(resolved), DirectExecutor(family)

    async def enlarge(name: str, pixels: Pixels, size: tuple[int, int], share: str) -> Pixels:
        return upscaler.enlarge(name, pixels, *size, lambda done, total: None)

    listener = CallbackListener(lambda progress: reports.append((progress.step, progress.steps)), False)
    context = SubmissionContext(Caller(), background=False)
    drawn = asyncio.run(
        draw_passes(executor, enlarge, resolved, layout, layout.request, context, listener)  # type: ignore[arg-type]  # a stand-in
    )
    assert drawn.image.timings["steps"] == 2
    assert not drawn.image.request.keeps_latents
    return drawn.layout.compose_output(drawn.image.product.pixels), executor.drawn, reports


def by_stock(family: Any, way: str, **own: Any) -> Pixels:
    """The same by hand: text to image, the enlargement, image to image with the next seed."""
    job = replace(REQUEST, guidance_scale=family.spec.default_guidance)
    arguments = {"prompt": job.prompt, "guidance_scale": job.guidance_scale, "num_inference_steps": 4}
    text = stock_pipeline(family, "StableDiffusionXLPipeline", job)  # type: ignore[arg-type]  # has what is read
    keeps = {"output_type": "latent"} if way == "latent" else {}
    first = text(**arguments, width=SIDE, height=SIDE, generator=torch.Generator().manual_seed(7), **keeps).images
    if way == "latent":
        side = LARGE // text.vae_scale_factor
        given: Any = functional.interpolate(first, size=(side, side), mode="bilinear")
    elif way == "Lanczos":
        given = first[0].resize((LARGE, LARGE), Image.Resampling.LANCZOS)
    else:
        pixels = NetworkUpscaler("cpu").enlarge(EMBEDDED, np.asarray(first[0]), LARGE, LARGE, lambda done, total: None)
        given = Image.fromarray(pixels)
    arguments |= {"num_inference_steps": 5, "strength": 0.6, "image": given, "output_type": "np", **own}
    again = replace(job, num_inference_steps=5, scheduler=own.pop("scheduler", "euler"))
    arguments.pop("scheduler", None)
    second = stock_pipeline(family, "StableDiffusionXLImg2ImgPipeline", again)  # type: ignore[arg-type]  # a stand-in
    drawn = second(**arguments, generator=torch.Generator().manual_seed(8)).images[0]
    pixels = (drawn * 255).round().astype(np.uint8)
    return pixels


@pytest.mark.parametrize(
    ("way", "upscaler"), [("Lanczos", None), ("network", "embedded-2x"), ("latent", "latent")], ids=lambda value: value
)
def test_both_passes_are_those_of_a_chain_of_stock_calls(
    families: dict[str, Any], way: str, upscaler: str | None
) -> None:
    """The picture of both passes; the second one with the next seed."""
    family = families["sdxl-4"]
    ours, (first, second), reports = both_passes(family, hires_upscaler=upscaler)
    assert (first.keeps_latents, second.latents is not None) == (way == "latent", way == "latent")
    assert (second.width, second.seed, second.strength, second.num_inference_steps) == (LARGE, 8, 0.6, 5)
    assert reports[-1] == (7, 7)
    stock = by_stock(family, way)
    assert stock.std() > 5, "a flat picture would prove nothing"
    assert largest_difference(ours, stock) <= 2


def test_the_second_pass_has_words_guidance_and_a_sampler_of_its_own(families: dict[str, Any]) -> None:
    """As the stock call with these; the first pass stays as it is."""
    family = families["sdxl-4"]
    ours, (first, second), _ = both_passes(family, **OWN, hires_upscaler="latent")
    assert (first.prompt, first.scheduler) == (PROMPT, "euler")
    assert (second.prompt, second.negative_prompt) == (OWN["hires_prompt"], OWN["hires_negative_prompt"])
    own = {"prompt": OWN["hires_prompt"], "negative_prompt": OWN["hires_negative_prompt"], "guidance_scale": 3.0}
    stock = by_stock(family, "latent", **own, scheduler="ddim")
    assert largest_difference(ours, stock) <= 2


def test_a_scale_is_that_of_the_image(families: dict[str, Any]) -> None:
    """1.5 times 256 is 384, as when the size is given, for both ways."""
    family = families["sdxl-4"]
    sized, _, _ = both_passes(family, hires_upscaler="latent")
    scaled, _, _ = both_passes(family, hires_upscaler="latent", hires_width=None, hires_height=None, hires_scale=1.5)
    assert (sized == scaled).all()
