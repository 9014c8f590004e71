"""Latent upscaling: equal to stock text-to-image, interpolation of its latents, and stock image-to-image over them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from drawing import SIDE, Pixels, draw, draw_together, job_for, largest_difference, psnr
from test_oracle import stock_arguments, stock_pipeline
from torch.nn import functional

from stable_diffusion_server.errors import NotFinite
from stable_diffusion_server.pipelines.enlarged_latents import enlarged, kept_latents
from stable_diffusion_server.types import DiffusionRequest, LatentArray, LatentResize, Task

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning")]

HALF = SIDE // 2
CPU = torch.device("cpu")


@dataclass(frozen=True)
class LatentCase:
    """A family with latents that stock calls know by their channels, how they are enlarged, torch's arguments."""

    family: str
    resize: LatentResize
    arguments: dict[str, Any]
    scheduler: str | None = None

    @property
    def model(self) -> str:
        return self.family.partition("-")[0]

    @property
    def stock(self) -> tuple[str, str]:
        name = "StableDiffusionXL" if self.model == "sdxl" else "Flux"
        return f"{name}Pipeline", f"{name}Img2ImgPipeline"


CASES = [
    LatentCase("sdxl-4", LatentResize.BILINEAR, {"mode": "bilinear"}),
    LatentCase("sdxl-4", LatentResize.BICUBIC_ANTIALIASED, {"mode": "bicubic", "antialias": True}, "euler_a"),
    LatentCase("sdxl-4", LatentResize.NEAREST_EXACT, {"mode": "nearest-exact"}),
    LatentCase("flux-16", LatentResize.BICUBIC, {"mode": "bicubic"}),
]


def both_passes(family: Any, case: LatentCase) -> tuple[DiffusionRequest, DiffusionRequest]:
    """The requests of the two passes, the first already drawn."""
    choice = {} if case.scheduler is None else {"scheduler": case.scheduler}
    first = job_for(case.model, width=HALF, height=HALF, keeps_latents=True, **choice)
    state = family.prepare(first)
    while not state.done:
        family.step([state])
    kept = family.finish(state).latents
    assert kept is not None
    second = job_for(case.model, seed=8, num_inference_steps=6, strength=0.6, **choice)
    return first, replace(second, task=Task.IMAGE_TO_IMAGE, latents=LatentArray(kept, case.resize))


def by_stock(family: Any, case: LatentCase, first: DiffusionRequest, second: DiffusionRequest) -> Pixels:
    text, image = (stock_pipeline(family, name, job) for name, job in zip(case.stock, (first, second), strict=True))
    arguments = stock_arguments(family, first)
    generator = torch.Generator().manual_seed(first.seed)
    latents = text(**arguments, width=HALF, height=HALF, generator=generator, output_type="latent").images
    if case.model == "flux":
        latents = text._unpack_latents(latents, HALF, HALF, text.vae_scale_factor)
    side = SIDE // text.vae_scale_factor
    larger = functional.interpolate(latents, size=(side, side), **case.arguments)
    arguments = stock_arguments(family, second)
    generator = torch.Generator().manual_seed(second.seed)
    size = {} if case.model == "sdxl" else {"width": SIDE, "height": SIDE}
    given = {"image": larger, "strength": second.strength, "output_type": "np", **size}
    drawn = image(**arguments, **given, generator=generator).images[0]
    pixels: Pixels = (drawn * 255).round().astype(np.uint8)
    return pixels


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.family}: {case.resize}")
def test_both_passes_are_drawn_as_the_stock_chain_draws_them(case: LatentCase, families: dict[str, Any]) -> None:
    """No pixel differs by more than 2 of 255: nothing is decoded between, and noise is added as the stock call does."""
    family = families[case.family]
    first, second = both_passes(family, case)
    ours, stock = draw(family, second), by_stock(family, case, first, second)
    assert stock.std() > 5, "a flat picture would prove nothing"
    assert largest_difference(ours, stock) <= 2


def test_latents_share_passes_with_other_requests(families: dict[str, Any]) -> None:
    """One from latents and one from text, in one batch, as each alone."""
    family = families[CASES[0].family]
    _, second = both_passes(family, CASES[0])
    other = job_for("sdxl", seed=3)
    together = draw_together(family, [second, other])
    assert min(psnr(pixels, draw(family, job)) for pixels, job in zip(together, (second, other), strict=True)) >= 45


@pytest.mark.parametrize("resize", LatentResize)
@pytest.mark.parametrize(("height", "width"), [(16, 16), (16, 12), (9, 16), (8, 8)])
def test_what_exceeds_the_aspect_ratio_is_cut_off_evenly(resize: LatentResize, height: int, width: int) -> None:
    """Latents that are alike on the left and the right stay so, at any size, and every cell is covered."""
    half = np.random.default_rng(0).normal(size=(4, 8, 4)).astype(np.float32)
    latents = LatentArray(np.concatenate([half, half[..., ::-1]], axis=-1), resize)
    found = enlarged(latents, height, width, CPU)
    assert found.shape == (1, 4, height, width)
    if resize is not LatentResize.NEAREST:  # which takes the cell to the left
        assert torch.allclose(found, found.flip(-1), atol=1e-5)


def test_latents_are_known_by_content_size_and_way_of_enlarging() -> None:
    """What decides the pixels of the second pass decides its digest."""
    values = np.zeros((4, 8, 8), np.float32)
    same, other = LatentArray(values, LatentResize.BILINEAR), LatentArray(values + 1, LatentResize.BILINEAR)
    assert same == LatentArray(values.copy(), LatentResize.BILINEAR)
    others = {other.digest, LatentArray(values, LatentResize.BICUBIC).digest, same.digest}
    assert len(others | {LatentArray(values.reshape(4, 4, 16), LatentResize.BILINEAR).digest}) == 4


def test_latents_that_are_not_finite_are_not_kept() -> None:
    """So that the pass is drawn again with another seed."""
    with pytest.raises(NotFinite):
        kept_latents(torch.tensor([[[[float("nan")]]]]))
