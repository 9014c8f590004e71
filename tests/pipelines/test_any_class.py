"""Classes of diffusers of every kind are drawn as their own call draws them: stages, pixels, tokens, blocks."""

from __future__ import annotations

import dataclasses
import threading
from dataclasses import replace
from inspect import signature
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny_stock
import torch
from drawing import Pixels, draw, largest_difference
from PIL import Image
from stock_families import direct_call, request_of
from tiny_parts import SIDE

from stable_diffusion_server.pipelines.families.stock import Stock
from stable_diffusion_server.pipelines.loading.vision_processor import give_cosmos_a_resize
from stable_diffusion_server.pipelines.stock_classes import stock_class
from stable_diffusion_server.pipelines.stock_rows import stock_row
from stable_diffusion_server.types import DiffusionRequest, Task

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]

_TEXT, _IMAGE, _MASK, _EDIT = Task.TEXT_TO_IMAGE, Task.IMAGE_TO_IMAGE, Task.INPAINT, Task.EDIT
PLAIN = {"use_resolution_binning": False, "clean_caption": False}
# Amused draws tokens by chance, and rounding that differs in the last digit turns a token over: it is no oracle.
INEXACT = ("amused",)
CASES: list[tuple[str, Task]] = [
    *((name, _TEXT) for name in tiny_stock.FAMILIES if name not in ("instruct-pix2pix", *INEXACT)),
    ("instruct-pix2pix", _EDIT), ("klein-blocks", _EDIT),
    ("sd-pag", _IMAGE), ("kandinsky3", _IMAGE), ("anima", _IMAGE),
    ("sd-pag", _MASK),
]  # fmt: skip


def family_of(name: str) -> Stock:
    """The stock family over a tiny pipeline, by the row that a folder of its class gets."""
    pipeline = tiny_stock.build(name)
    row = stock_row(type(pipeline).__name__)
    assert row is not None
    return Stock(pipeline, replace(row, name=name, native_pixels=4 * SIDE**2, min_side=SIDE))


def whole_call(name: str, request: DiffusionRequest) -> Pixels:
    """The request drawn by the class's own call, over components of its own."""
    pipeline = tiny_stock.build(name)
    known = stock_class(type(pipeline).__name__)
    assert known is not None
    kind = stock_class(known.tasks[request.task])
    assert kind is not None
    if known.modular:
        return _blocks_call(pipeline, request, guided=known.guider)
    if kind.name != known.name:
        wanted = signature(getattr(diffusers, kind.name)).parameters
        parts = {**pipeline.config, **pipeline.components}
        pipeline = getattr(diffusers, kind.name)(**{key: part for key, part in parts.items() if key in wanted})
    if name == "hidream":  # it draws every picture at this area, of 1024 × 1024 by default
        pipeline.default_sample_size = SIDE // 8
    if hasattr(pipeline, "resolutions"):  # Kandinsky 5 draws one of its own
        pipeline.resolutions = [(request.width, request.height)]
    given: dict[str, Any] = {key: value for key, value in PLAIN.items() if key in kind.parameters.names}
    if "_auto_resize" in kind.parameters.names:
        given |= {"_auto_resize": False}
    if "intermediate_timesteps" in kind.parameters.names and request.num_inference_steps != 2:
        given["intermediate_timesteps"] = None
    if "max_area" in kind.parameters.names:
        given |= {"max_area": request.width * request.height}
    if kind.parameters.guidance:
        given[kind.parameters.guidance] = request.guidance_scale
    if kind.parameters.guidance == "true_cfg_scale":
        given["negative_prompt"] = " "
    return direct_call(pipeline, request, **given)


def _blocks_call(pipeline: Any, request: DiffusionRequest, *, guided: bool) -> Pixels:
    if guided:
        pipeline.update_components(guider=pipeline.guider.new(guidance_scale=request.guidance_scale))
    images: dict[str, Any] = {}
    if request.image is not None:
        images = {"image": Image.fromarray(request.image.pixels), "strength": request.strength}
    if request.references:
        images = {"image": [Image.fromarray(one.pixels) for one in request.references]}
    drawn = pipeline(
        prompt=request.prompt,
        height=request.height,
        width=request.width,
        num_inference_steps=request.num_inference_steps,
        generator=torch.Generator().manual_seed(request.seed),
        output="images",
        **images,
    )
    return np.asarray(drawn[0])


@pytest.fixture(autouse=True)
def without_torchvision() -> None:
    """Loading a folder with this transformer does the same."""
    give_cosmos_a_resize()


@pytest.mark.parametrize(("name", "task"), CASES)
def test_a_class_is_drawn_as_its_own_call_draws(name: str, task: Task) -> None:
    """Difference 0, alone and beside a shorter request of another seed and prompt; another prompt differs by more."""
    family = family_of(name)
    request = request_of(family, task, num_inference_steps=3)
    other = dataclasses.replace(request, prompt="a small house by the sea", seed=8, num_inference_steps=2)
    expected = whole_call(name, request)
    far = largest_difference(expected, whole_call(name, dataclasses.replace(request, prompt=other.prompt)))
    assert far > 4, "the prompt must show, otherwise this test proves nothing"
    states = [family.prepare(one) for one in (request, other)]
    while waiting := [state for state in states if not state.done]:
        for state in waiting:
            family.step([state])
            assert state.index <= state.steps
    ours, beside = (family.finish(state).pixels for state in states)
    assert ours.shape == (SIDE, SIDE, 3)
    assert largest_difference(ours, expected) == 0
    assert largest_difference(beside, whole_call(name, other)) == 0


@pytest.mark.parametrize("name", ["kandinsky22", "deepfloyd-if", "z-image-blocks", "anima", "sd-pag"])
def test_a_cancelled_call_of_each_kind_ends_its_thread_at_once(name: str) -> None:
    """Between two steps, whoever calls back; the model then draws as before."""
    family = family_of(name)
    request = request_of(family, num_inference_steps=2)
    expected = draw(family, request)
    state: Any = family.prepare(request_of(family, seed=99))
    family.step([state])
    assert 1 <= state.index < state.steps
    state.running.cancel()
    assert not [thread for thread in threading.enumerate() if thread.name == "stock-call"]
    assert (draw(family, request) == expected).all()


def test_both_stages_of_a_combined_pipeline_are_steps() -> None:
    """The prior's 25 steps, which `extra` changes, and those of the decoder."""
    family = family_of("kandinsky22")
    request = request_of(family, num_inference_steps=3, extra=(("prior_num_inference_steps", 4),))
    state = family.prepare(request)
    assert state.steps == 7
    seen = []
    while not state.done:
        family.step([state])
        seen.append((state.index, state.steps))
    assert seen == [(number, 7) for number in range(1, 8)]


def test_attention_of_a_cancelled_guidance_stays_with_its_call() -> None:
    """Perturbed attention is in the shared UNet during its own steps only."""
    family = family_of("sd-pag")
    plain = request_of(family, num_inference_steps=2, extra=(("pag_scale", 0.0),))
    expected = draw(family, plain)
    perturbed: Any = family.prepare(request_of(family))
    family.step([perturbed])
    assert (draw(family, plain) == expected).all(), "beside a call that waits"
    del perturbed
    assert (draw(family, plain) == expected).all(), "after one that was cancelled"


def test_a_wide_picture_has_the_size_that_was_asked_for() -> None:
    """HiDream would draw it at an area of its own."""
    for name in ("hidream", "kandinsky3", "z-image-blocks", *INEXACT):
        family = family_of(name)
        assert draw(family, request_of(family, width=192, height=64, num_inference_steps=1)).shape == (64, 192, 3)


def test_the_schedule_of_sana_sprint_fits_any_number_of_steps() -> None:
    """Its default of a middle level of noise is for two steps alone."""
    from stable_diffusion_server.pipelines.stock.call_arguments import call_arguments

    known, spec = stock_class("SanaSprintPipeline"), stock_row("SanaSprintPipeline")
    assert known is not None
    assert spec is not None
    family = family_of("pixart-alpha")
    for steps, given in ((1, True), (2, False), (4, True)):
        request = request_of(family, num_inference_steps=steps)
        arguments = call_arguments(request, spec, known.parameters, latent=True)
        assert ("intermediate_timesteps" in arguments) == given
