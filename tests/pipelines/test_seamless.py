"""Seamless pictures: equal to stock pipelines with circular convolutions, on this thread and in this request alone."""

from __future__ import annotations

import copy
import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from drawing import MODELS_DIR, Pixels, draw, draw_together, job_for, largest_difference, outline, scene
from test_oracle import Case, draw_by_stock
from torch.nn import functional

from stable_diffusion_server.pipelines.acceleration.onednn import OneDnnConv2d
from stable_diffusion_server.pipelines.catalog import MODELS
from stable_diffusion_server.pipelines.families.sdxl import Sdxl
from stable_diffusion_server.pipelines.loading.components import load_controlnet, load_pipeline
from stable_diffusion_server.pipelines.registry import LoadOptions, Registry, load
from stable_diffusion_server.pipelines.vae_tiles import VaeTiling
from stable_diffusion_server.pipelines.wrapping import current_tiling, is_altered, wrapping
from stable_diffusion_server.types import DiffusionRequest, Tiling

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning")]

SEAMLESS = job_for("sdxl", prompt="a green square", tiling=Tiling.BOTH)
CONVOLUTIONS = [(3, 1, 1, 1, 1), (3, 2, 1, 1, 1), (1, 1, 0, 1, 1), (5, 1, 2, 1, 2), (3, 1, 2, 2, 4)]


def roll(family: Any, job: DiffusionRequest, shift: tuple[int, int]) -> Pixels:
    """The job's picture from noise that is rolled by `shift` latents, down and across."""
    state = family.prepare(job)
    state.latents = torch.roll(state.latents, shift, (-2, -1))
    while not state.done:
        family.step([state])
    pixels: Pixels = family.finish(state).pixels
    return pixels


def seam(pixels: Pixels, scale: int) -> float:
    """How much more left and right border differ than the columns at other borders of latents do in the mean."""
    columns = pixels.astype(float)
    inner = np.abs(np.diff(columns, axis=1)[:, scale - 1 :: scale]).mean()
    return float(np.abs(columns[:, 0] - columns[:, -1]).mean() / inner)


@pytest.fixture(scope="module")
def circular() -> Sdxl:
    """The embedded SDXL, all of whose convolutions are circular in PyTorch's own way."""
    facts, cpu = MODELS["sdxl"], torch.device("cpu")
    family = Sdxl(load_pipeline(facts, MODELS_DIR, cpu), facts, load_controlnet(facts, MODELS_DIR, cpu))
    for network in (family.pipeline.unet, family.pipeline.vae, family.controlnet):
        for part in network.modules():
            if isinstance(part, torch.nn.Conv2d):
                part.padding_mode = "circular"
    return family


@pytest.mark.parametrize(("size", "stride", "padding", "dilation", "groups"), CONVOLUTIONS)
@pytest.mark.parametrize("tiling", Tiling)
@pytest.mark.parametrize("kind", [torch.nn.Conv2d, OneDnnConv2d])
def test_a_convolution_that_wraps_is_the_circular_one(
    kind: type, tiling: Tiling, size: int, stride: int, padding: int, dilation: int, groups: int
) -> None:
    """On both axes PyTorch's own; on one axis a padding by hand; outside the block as before."""
    layer = torch.nn.Conv2d(4, 8, size, stride, padding, dilation, groups)
    own = copy.deepcopy(layer)
    own.__class__ = kind
    own.requires_grad_(False)
    for layout in (torch.contiguous_format, torch.channels_last):
        given = torch.randn(2, 4, 8, 6).to(memory_format=layout)
        across, down = padding * tiling.wraps_x, padding * tiling.wraps_y
        padded = functional.pad(given, (across, across, down, down), mode="circular")
        rest = (padding - across, padding - across, padding - down, padding - down)
        expected = functional.conv2d(
            functional.pad(padded, rest), layer.weight, layer.bias, stride, 0, dilation, groups
        )
        with torch.inference_mode():
            with wrapping(tiling):
                torch.testing.assert_close(own(given), expected, rtol=1e-5, atol=1e-5)
                with wrapping(None):
                    torch.testing.assert_close(own(given), layer(given), rtol=1e-5, atol=1e-5)
                torch.testing.assert_close(own(given), expected, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(own(given), layer(given), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("stock", "more"),
    [
        ("StableDiffusionXLPipeline", {}),
        ("StableDiffusionXLPipeline", {"width": 192, "scheduler": "euler_a", "guidance_scale": 1.0}),
        ("StableDiffusionXLImg2ImgPipeline", {"image": scene(), "strength": 0.6}),
        ("StableDiffusionXLControlNetPipeline", {"control": outline(), "control_scale": 0.7}),
    ],
)
def test_a_seamless_picture_is_that_of_circular_convolutions(
    stock: str, more: dict[str, Any], sdxl: Any, circular: Sdxl
) -> None:
    """The stock pipeline over networks whose convolutions are circular, to 2 of 255; without tiling it differs."""
    job = replace(SEAMLESS, **more)
    expected = draw_by_stock(circular, Case("", "sdxl", stock), replace(job, tiling=None))
    assert largest_difference(draw(sdxl, job), expected) <= 2
    assert largest_difference(draw(sdxl, replace(job, tiling=None)), expected) > 20


@pytest.mark.parametrize(
    ("tiling", "shift", "moves"),
    [
        (Tiling.BOTH, (8, 8), True),
        (Tiling.X, (0, 8), True),
        (Tiling.Y, (8, 0), True),
        (Tiling.X, (8, 0), False),
        (Tiling.Y, (0, 8), False),
        (None, (0, 8), False),
    ],
)
def test_rolled_noise_gives_the_rolled_picture(
    tiling: Tiling | None, shift: tuple[int, int], moves: bool, sdxl: Any
) -> None:
    """There is no border on an axis that wraps: the picture moves with its noise, and on other axes it does not."""
    job = replace(SEAMLESS, tiling=tiling, width=256, height=256, num_inference_steps=2)
    scale = sdxl.pipeline.vae_scale_factor
    expected = np.roll(draw(sdxl, job), [side * scale for side in shift], (0, 1))
    assert (largest_difference(roll(sdxl, job, shift), expected) <= 2) is moves


def test_the_borders_meet(sdxl: Any) -> None:
    """Left and right differ as neighbouring columns do; without tiling more."""
    scale = sdxl.pipeline.vae_scale_factor
    prompts = ("a green square", "a red circle on a blue background", "a yellow star")
    jobs = [
        replace(SEAMLESS, prompt=prompt, seed=seed, num_inference_steps=4, width=256)
        for seed, prompt in enumerate(prompts)
    ]
    with_tiling = [seam(draw(sdxl, job), scale) for job in jobs]
    without = [seam(draw(sdxl, replace(job, tiling=None)), scale) for job in jobs]
    print("\nseam over inner gradient, with and without:", np.round(with_tiling, 2), np.round(without, 2))  # noqa: T201  # the measurement
    assert max(with_tiling) < 2
    assert np.mean(without) > 2 * np.mean(with_tiling)


def test_tiles_of_the_vae_meet_too(sdxl: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoded in tiles, the picture is nearly the one that is decoded whole, above all at its borders."""
    whole = draw(sdxl, SEAMLESS).astype(int)
    monkeypatch.setattr(sdxl, "tiling", VaeTiling(0, 64))
    tiles = draw(sdxl, SEAMLESS).astype(int)
    unaware = draw(sdxl, replace(SEAMLESS, tiling=None)).astype(int)
    assert tiles.shape == whole.shape
    borders = np.s_[:, [0, 1, -2, -1]]
    assert np.abs(tiles - whole)[borders].mean() < 8 < np.abs(unaware - whole)[borders].mean()
    assert not sdxl.pipeline.vae.use_tiling


def test_seamless_pictures_share_passes_with_their_like_alone(sdxl: Any) -> None:
    """A batch of two equals each alone; other tilings, and none, have another shape."""
    jobs = [SEAMLESS, replace(SEAMLESS, seed=8, prompt="a red circle", num_inference_steps=6)]
    for single, both in zip((draw(sdxl, job) for job in jobs), draw_together(sdxl, jobs), strict=True):
        assert largest_difference(single, both) <= 2
    shapes = {replace(SEAMLESS, tiling=tiling).shape for tiling in (None, *Tiling)}
    assert len(shapes) == 4
    states = [sdxl.prepare(replace(SEAMLESS, tiling=tiling)) for tiling in (None, *Tiling)]
    assert len({state.shape for state in states}) == 4


def test_a_neighbour_on_another_thread_is_drawn_as_usual(sdxl: Any) -> None:
    """Its passes run while this thread is within a block that wraps, and equal bit for bit those without."""
    job = replace(SEAMLESS, tiling=None)
    alone, beside = draw(sdxl, job), list[Pixels]()
    with wrapping(Tiling.BOTH):
        neighbour = threading.Thread(target=lambda: beside.append(draw(sdxl, job)))
        neighbour.start()
        neighbour.join()
        assert is_altered()
    assert np.array_equal(alone, beside[0])
    assert np.array_equal(alone, draw(sdxl, job))


def test_a_failure_in_a_pass_ends_the_wrapping(sdxl: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error in the UNet or the VAE leaves the thread as it was: the next picture is the usual one."""
    job = replace(SEAMLESS, tiling=None)
    before = draw(sdxl, job)
    for network in (sdxl.pipeline.unet, sdxl.pipeline.vae.decoder):
        with monkeypatch.context() as patched:

            def fail(*_: Any, **__: Any) -> None:
                assert current_tiling() is Tiling.BOTH
                raise torch.OutOfMemoryError("no memory")

            patched.setattr(network, "forward", fail)
            with pytest.raises(Exception, match="no memory"):
                draw(sdxl, SEAMLESS)
        assert current_tiling() is None
        assert not is_altered()
    assert np.array_equal(before, draw(sdxl, job))


@pytest.fixture(scope="module")
def accelerated() -> Registry:
    """The embedded SDXL with oneDNN, channels last and TorchScript."""
    return load(MODELS_DIR, "cpu", 1, LoadOptions(models={"sdxl": MODELS["sdxl"]}, performance="safe"))


def test_accelerated_passes_are_left_aside_and_stay_as_they_were(sdxl: Any, accelerated: Registry) -> None:
    """A trace is made by usual passes, the seamless picture does not use it, and usual ones do afterwards."""
    job = replace(SEAMLESS, tiling=None)
    for _ in range(4):
        usual = draw(accelerated, job)
    assert largest_difference(draw(accelerated, SEAMLESS), draw(sdxl, SEAMLESS)) <= 2
    assert np.array_equal(usual, draw(accelerated, job))
