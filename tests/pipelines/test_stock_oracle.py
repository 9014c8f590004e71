"""The stock family draws what a pipeline's own call draws, for each class and task, alone and interleaved."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import diffusers
import pytest
import tiny_families
from drawing import Pixels, draw, largest_difference
from stock_families import direct_call, picture, request_of, stock_family

from stable_diffusion_server.types import Task

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]

SMALL = {"max_sequence_length": 64}
BINNED = {"use_resolution_binning": False}
NEGATIVE: dict[str, Any] = {"negative_prompt": "sea"}
TRUE = {"true_cfg_scale": 4.0, "negative_prompt": " "}
# Name in tiny_families, task, class of the oracle, its arguments, changes of the request.
CASES: list[tuple[str, Task, str, dict[str, Any], dict[str, Any]]] = [
    ("sd3", Task.TEXT_TO_IMAGE, "StableDiffusion3Pipeline", {"guidance_scale": 3.5, **SMALL}, {}),
    ("sd3", Task.TEXT_TO_IMAGE, "StableDiffusion3Pipeline", {"guidance_scale": 3.5, **SMALL, **NEGATIVE}, NEGATIVE),
    ("chroma", Task.TEXT_TO_IMAGE, "ChromaPipeline", {"guidance_scale": 3.0, **SMALL}, {}),
    ("lumina2", Task.TEXT_TO_IMAGE, "Lumina2Pipeline", {"guidance_scale": 4.0}, {}),
    ("aura-flow", Task.TEXT_TO_IMAGE, "AuraFlowPipeline", {"guidance_scale": 3.5}, {}),
    ("pixart-sigma", Task.TEXT_TO_IMAGE, "PixArtSigmaPipeline", {"guidance_scale": 4.5, **BINNED}, {}),
    ("sana", Task.TEXT_TO_IMAGE, "SanaPipeline", {"guidance_scale": 4.5, **BINNED}, {}),
    ("qwen-image", Task.TEXT_TO_IMAGE, "QwenImagePipeline", TRUE, {}),
    ("flux-dev", Task.TEXT_TO_IMAGE, "FluxPipeline", {"guidance_scale": 3.5, **SMALL}, {}),
    ("flux2-klein", Task.TEXT_TO_IMAGE, "Flux2KleinPipeline", {"guidance_scale": 3.5, **SMALL}, {}),
    ("z-image", Task.TEXT_TO_IMAGE, "ZImagePipeline", {"guidance_scale": 3.5, **NEGATIVE}, NEGATIVE),
    ("sd15", Task.TEXT_TO_IMAGE, "StableDiffusionPipeline", {"guidance_scale": 3.5}, {}),
    ("flux-kontext", Task.EDIT, "FluxKontextPipeline",
     {"guidance_scale": 2.5, **SMALL, "max_area": 64 * 64, "_auto_resize": False}, {}),
    ("sd3", Task.IMAGE_TO_IMAGE, "StableDiffusion3Img2ImgPipeline", {"guidance_scale": 3.5, **SMALL}, {}),
    ("sd3", Task.INPAINT, "StableDiffusion3InpaintPipeline", {"guidance_scale": 3.5, **SMALL}, {}),
    ("chroma", Task.IMAGE_TO_IMAGE, "ChromaImg2ImgPipeline", {"guidance_scale": 3.0, **SMALL}, {}),
    ("qwen-image", Task.IMAGE_TO_IMAGE, "QwenImageImg2ImgPipeline", TRUE, {}),
    ("qwen-image", Task.INPAINT, "QwenImageInpaintPipeline", TRUE, {}),
    ("z-image", Task.IMAGE_TO_IMAGE, "ZImageImg2ImgPipeline", {"guidance_scale": 3.5}, {}),
    ("sd15", Task.IMAGE_TO_IMAGE, "StableDiffusionImg2ImgPipeline", {"guidance_scale": 3.5}, {}),
    ("sd15", Task.INPAINT, "StableDiffusionInpaintPipeline", {"guidance_scale": 3.5}, {}),
]  # fmt: skip


@pytest.fixture(scope="module")
def table() -> Iterator[list[str]]:
    """Table rows to quote, printed at the end (`pytest -s`)."""
    rows: list[str] = []
    yield rows
    print("\n| class | task | largest difference of 255 | with another prompt |\n| --- | --- | --- | --- |")  # noqa: T201  # the table
    print("\n".join(rows))  # noqa: T201  # the table


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[2]}{'-negative' if case[4] else ''}")
def test_a_request_is_drawn_as_the_class_draws_it(case: tuple[Any, ...], table: list[str]) -> None:
    """To within 2 of 255; another prompt, or another reference, is further away. Two interleaved ones equal these."""
    name, task, class_name, arguments, changes = case
    family = stock_family(name)
    oracle = _oracle(name, class_name)
    if class_name == "StableDiffusion3InpaintPipeline":  # it encodes with the shift and decodes without it: 6 of 255
        for pipeline in (family.pipeline, oracle):
            pipeline.vae.register_to_config(shift_factor=0.0)
    request = request_of(family, task, **changes)
    stock = direct_call(oracle, request, **arguments)
    other = dataclasses.replace(request, prompt="a small house by the sea", seed=8, num_inference_steps=3)
    far = largest_difference(stock, direct_call(oracle, dataclasses.replace(request, prompt=other.prompt), **arguments))
    assert far > 4, "the prompt must show, otherwise this test proves nothing"
    if task is Task.EDIT:
        seen = dataclasses.replace(request, references=(picture(5),))
        assert largest_difference(stock, direct_call(oracle, seen, **arguments)) > 4
    ours, beside = _interleaved(family, request, other)
    near = largest_difference(ours, stock)
    table.append(f"| {class_name} | {task} | {near} | {far} |")
    assert near <= 2
    assert largest_difference(beside, direct_call(oracle, other, **arguments)) <= 2
    assert (draw(family, request) == ours).all()


def _interleaved(family: Any, *requests: Any) -> list[Pixels]:
    """Both started, then a step of each in turn, as when one waits while the other is drawn."""
    states = [family.prepare(request) for request in requests]
    while waiting := [state for state in states if not state.done]:
        for state in waiting:
            family.step([state])
    return [family.finish(state).pixels for state in states]


def _oracle(name: str, class_name: str) -> Any:
    """The class over components of its own, the same weights."""
    pipeline = tiny_families.build(name)
    if type(pipeline).__name__ == class_name:
        return pipeline
    kind = getattr(diffusers, class_name)
    given = {"requires_safety_checker": False} if name == "sd15" else {}
    return kind(**pipeline.components, **given)
