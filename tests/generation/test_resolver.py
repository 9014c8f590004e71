"""Request resolution and layout: digests, names, and what is put on the canvas."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from control_networks import KnownNetworks
from fakes import disc
from image_prompt_adapters import KnownAdapters
from pydantic import TypeAdapter

from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.generation.layout import lay_out_images
from stable_diffusion_server.generation.limits import RequestLimits
from stable_diffusion_server.generation.prompts import BUILTIN_STOP_WORDS, StopWords
from stable_diffusion_server.generation.provenance import requested_fields
from stable_diffusion_server.generation.repair_requests import ChosenDetector, NoDetector
from stable_diffusion_server.generation.resolver import GenerationOptions, resolve_request
from stable_diffusion_server.pipelines.catalog import MODELS
from stable_diffusion_server.types import (
    ControlKind,
    ControlUnit,
    DetailRepair,
    Extension,
    Fill,
    Fit,
    Format,
    GenerationRequest,
    ImageInput,
    ImagePrompt,
    MaskMode,
    PromptSyntax,
    Task,
    Tiling,
)


class AnyDetector(NoDetector):
    """Knows every name."""

    def find(self, name: str, field: str) -> ChosenDetector:
        return ChosenDetector(name, "5e6f")


OPTIONS = GenerationOptions(
    RequestLimits(),
    "sdxl",
    "up",
    loras=lambda: {"pastel": "1a2b", "ink": "3c4d"},
    controlnets=KnownNetworks(),
    image_prompts=KnownAdapters(),
    detector=AnyDetector(),
)
EDGELESS_FLUX = replace(OPTIONS, models={**MODELS, "flux": replace(MODELS["flux"], control_folder=None)})
BY_URL = GenerationRequest(
    Task.INPAINT,
    "a red disc",
    image=ImageInput("image_url", url="http://a.example/i"),
    mask=ImageInput("mask_url", url="http://a.example/m"),
)
FETCHED = {"image_url": b"image", "mask_url": b"mask"}
UPLOADED = replace(BY_URL, image=ImageInput("image_file", data=b"image"), mask=ImageInput("mask_file", data=b"mask"))

# A changed value for each field that changes the image, and the fields that do not.
CHANGED: dict[str, Any] = {
    "task": Task.IMAGE_TO_IMAGE,
    "prompt": "a blue disc",
    "width": 64,
    "height": 64,
    "model": "flux",
    "negative_prompt": "blur",
    "seed": 7,
    "num_inference_steps": 5,
    "guidance_scale": 3.0,
    "scheduler": "ddim",
    "image": ImageInput("image_file", data=b"other"),
    "mask": ImageInput("mask_file", data=b"other"),
    "strength": 0.5,
    "feather": 3,
    "canny": True,
    "refine": True,
    "loras": (("pastel", 0.5),),
    "variation": 1,
    "fill": Fill.NOISE,
    "only_masked": 32,
    "extend": Extension(right=64),
    "controls": (ControlUnit(kind=ControlKind.CANNY, image=ImageInput("controls[0].image", data=b"edges")),),
    "image_prompts": (ImagePrompt(ImageInput("image_prompts[0].image", data=b"style")),),
    "repairs": (DetailRepair("faces"),),
    "references": (ImageInput("image_file[0]", data=b"reference"),),
    "extra": (("cfg_truncation", 0.5),),
    "clip_skip": 1,
    "sampling": (("schedule", "karras"),),
    "lora_parts": (("style", "te=0.5"),),
    "prompt_2": "a blue wall",
    "tiling": Tiling.X,
    "mask_mode": MaskMode.SOFT,
}
# A model that takes the parameters of its diffusers class.
WITH_OWN = replace(MODELS["sdxl"], any_extra=True, pipeline_class="ZImagePipeline")
WITH_CANNY: dict[str, Any] = {"canny_low": 90, "canny_high": 210, "control_scale": 0.9}
WITH_SIZE: dict[str, Any] = {"fit": Fit.STRETCH}
# A second pass of another size, and what it can have of its own.
HIRES: dict[str, Any] = {"hires_width": 128, "hires_height": 128, "hires_steps": 2, "hires_strength": 0.5}
OTHER_HIRES: dict[str, Any] = {"hires_width": 192, "hires_height": 192, "hires_steps": 3, "hires_strength": 0.4}
WITH_HIRES: dict[str, Any] = {
    "hires_upscaler": "latent",
    "hires_scheduler": "ddim",
    "hires_schedule": "karras",
    "hires_guidance": 3.5,
    "hires_prompt": "a green disc",
    "hires_negative_prompt": "blur",
    "hires_loras": (("pastel", 0.5),),
}
WITH_WEIGHTS: dict[str, Any] = {"prompt_syntax": PromptSyntax.PLAIN}
NOT_IN_THE_PICTURE = {
    "save_path",
    "format",
    "quality",
    "overwrite",
    "timeout",
    "named_by_content",
    "folder",
    "alone",
    "webhook_url",
    "named_for",
    "allow_empty_prompt",
    "at_least_one_step",
    # What they do is in the prompts when a request is resolved.
    "styles",
    "wildcards",
    "expanded",
}


def test_an_adapter_is_identified_by_its_weights_and_not_by_its_name_alone() -> None:
    """Other weights under the same name give another image; the same weights the same one."""
    order = replace(UPLOADED, loras=(("pastel", 0.5),))
    mine, same, other = (
        resolve_request(order, replace(OPTIONS, loras=lambda reported=reported: {"pastel": reported})).content_digest
        for reported in ("1a", "1a", "2b")
    )
    assert mine == same != other


@pytest.mark.parametrize(("there", "said"), [({}, "No adapters are offered"), ({"ink": "3c"}, "there are ink")])
def test_an_adapter_that_is_not_there_is_refused_before_anything_is_drawn(there: dict[str, str], said: str) -> None:
    """The error names the parameter and lists the available ones."""
    with pytest.raises(InvalidInput, match=said) as caught:
        resolve_request(replace(UPLOADED, loras=(("pastel", 1.0),)), replace(OPTIONS, loras=lambda: there))
    assert caught.value.field == "lora"


def test_a_default_model_that_does_not_draw_here_gives_way() -> None:
    """With one family of weights, a request without a model uses that family."""
    options = replace(OPTIONS, models={"flux": MODELS["flux"]})
    assert resolve_request(GenerationRequest(Task.TEXT_TO_IMAGE, "a red disc"), options).parameters.spec.name == "flux"
    with pytest.raises(InvalidInput, match="there are flux"):
        resolve_request(GenerationRequest(Task.TEXT_TO_IMAGE, "a red disc", model="sdxl"), options)


# They change the identity of an enlargement (tests/api/test_upscaling.py), and drawing does not read them.
OF_UPSCALING = ("upscaler", "scale")


def test_every_field_of_a_request_is_recorded_or_known_not_to_matter() -> None:
    """Fails if a new request field is missing from the digest and from the list of irrelevant ones."""
    assert {field.name for field in fields(GenerationRequest)} == {
        *CHANGED,
        *WITH_CANNY,
        *WITH_SIZE,
        *WITH_WEIGHTS,
        *HIRES,
        *WITH_HIRES,
        "hires_scale",
        *NOT_IN_THE_PICTURE,
        *OF_UPSCALING,
    }


@pytest.mark.parametrize("name", [*CHANGED, *WITH_CANNY, *WITH_SIZE, *WITH_WEIGHTS])
def test_what_changes_the_picture_changes_its_identity(name: str) -> None:
    """Name, seed and all three digests differ."""
    sized = {"width": 64, "height": 128} if name in WITH_SIZE else {}
    words = {"prompt": "a (red:1.2) disc"} if name in WITH_WEIGHTS else {}
    base = replace(UPLOADED, canny=name in WITH_CANNY, **sized, **words)
    change = {name: {**CHANGED, **WITH_CANNY, **WITH_SIZE, **WITH_WEIGHTS}[name]}
    options = replace(OPTIONS, models={**MODELS, "sdxl": WITH_OWN} if name == "extra" else MODELS)
    plans = [resolve_request(order, options) for order in (base, replace(base, **change))]
    for part in ("key", "seed", "content_digest", "request_digest", "sent_digest"):
        assert len({getattr(plan, part) for plan in plans}) == 2, part


def test_the_order_of_references_is_part_of_the_identity() -> None:
    """Two images in the other order, one of them missing, or the same one twice: four identities."""
    one, two = (ImageInput(f"image_file[{data}]", data=data.encode()) for data in "ab")
    edits = [replace(UPLOADED, references=images) for images in ((one, two), (two, one), (one,), (one, one))]
    assert len({resolve_request(edit, OPTIONS).content_digest for edit in edits}) == 4


def test_what_does_not_change_the_picture_does_not_change_its_identity() -> None:
    """Thresholds without canny, the format, the quality, the name."""
    plan = resolve_request(UPLOADED, OPTIONS)
    for more in ({"canny_low": 90}, {"control_scale": 0.9}, {"format": Format.PNG}, {"quality": 9}, {"save_path": "a"}):
        assert resolve_request(replace(UPLOADED, **more), OPTIONS).content_digest == plan.content_digest


def test_the_identity_is_that_of_the_bytes_however_they_came() -> None:
    """By URL or as files: one image; other bytes at the same URL: another one."""
    by_url, by_file = resolve_request(BY_URL, OPTIONS, FETCHED), resolve_request(UPLOADED, OPTIONS)
    assert (by_url.content_digest, by_url.request_digest, by_url.key, by_url.seed) == (
        by_file.content_digest,
        by_file.request_digest,
        by_file.key,
        by_file.seed,
    )
    assert by_url.sent_digest != by_file.sent_digest
    changed = resolve_request(BY_URL, OPTIONS, {**FETCHED, "image_url": b"other"})
    assert changed.content_digest != by_url.content_digest
    assert changed.sent_digest == by_url.sent_digest == resolve_request(BY_URL, OPTIONS).sent_digest
    assert (
        resolve_request(BY_URL, OPTIONS, {"image_url": b"mask", "mask_url": b"image"}).content_digest
        != by_url.content_digest
    )


@pytest.mark.parametrize(
    ("order", "known"),
    [
        (replace(BY_URL, save_path="a.webp"), True),
        (BY_URL, False),
        (replace(BY_URL, save_path="a.webp", named_by_content=True), False),
    ],
)
def test_a_key_is_known_before_fetching_when_the_caller_named_it(order: GenerationRequest, known: bool) -> None:
    """Only with a name can the bucket be checked before the download."""
    plan = resolve_request(order, OPTIONS)
    assert plan.key_is_known is known
    assert (plan.key == resolve_request(order, OPTIONS, FETCHED).key) is known


@pytest.mark.parametrize(
    ("model", "asked", "follows"), [("sdxl", None, True), ("sdxl", False, False), ("flux", None, False)]
)
def test_edges_are_followed_by_default_where_a_model_can(model: str, asked: bool | None, follows: bool) -> None:
    """The upload route uses edges by default; a model without a ControlNet reports that it does not."""
    plan = resolve_request(
        replace(UPLOADED, task=Task.IMAGE_TO_IMAGE, mask=None, model=model, canny=asked), EDGELESS_FLUX
    )
    assert plan.parameters.canny is follows
    reported = {warning.code for warning in plan.parameters.warnings}
    assert ("canny-unavailable" in reported) is (model == "flux")


def test_edges_that_cannot_be_followed_are_refused_when_asked_for() -> None:
    """Before anything is decoded or queued, naming the parameter."""
    with pytest.raises(InvalidInput) as refused:
        resolve_request(replace(UPLOADED, task=Task.IMAGE_TO_IMAGE, mask=None, model="flux", canny=True), EDGELESS_FLUX)
    assert refused.value.field == "canny"


@pytest.mark.parametrize(("first", "second"), [({"quality": 50}, {"quality": 90}), ({}, {"format": Format.PNG})])
def test_files_that_differ_have_names_that_differ(first: dict[str, Any], second: dict[str, Any]) -> None:
    """The eight-digit content prefix depends on the file format too."""
    order = replace(UPLOADED, save_path="no-ending", named_by_content=True)
    assert (
        resolve_request(replace(order, **first), OPTIONS).key != resolve_request(replace(order, **second), OPTIONS).key
    )


def test_a_name_that_tells_the_content_keeps_its_folder() -> None:
    """Eight hexadecimal digits before the file name, equal for equal requests, also with a random seed."""
    order = replace(UPLOADED, save_path="a/b/out.webp", named_by_content=True, seed="random")
    keys = {resolve_request(order, OPTIONS).key for _ in range(3)}
    assert len(keys) == 1
    assert np.all([len(key.rsplit("/", 1)[1]) == len("1b4e28ba-out.webp") for key in keys])
    assert keys.pop().startswith("up/a/b/")
    with pytest.raises(InvalidInput):
        resolve_request(replace(order, save_path="a/b/"), OPTIONS)


@pytest.mark.fault(12)
@pytest.mark.parametrize(
    ("model", "steps", "strength", "taken"),
    [("sdxl", 4, 0.25, True), ("sdxl", 4, 0.24, False), ("flux", 4, 0.24, True), ("flux", 4, 0.0, False)],
)
def test_a_strength_that_leaves_no_step_is_refused_as_the_family_counts(
    model: str, steps: int, strength: float, taken: bool
) -> None:
    """SDXL rounds steps × strength down and Flux up, as their stock pipelines do; the error names both fields."""
    order = replace(UPLOADED, model=model, num_inference_steps=steps, strength=strength)
    if taken:
        resolve_request(order, OPTIONS)
        return
    with pytest.raises(InvalidInput) as refused:
        resolve_request(order, OPTIONS)
    assert {field for field, _ in refused.value.faults} == {"strength", "num_inference_steps"}


def test_a_scene_has_all_pictures_at_the_size_of_the_canvas() -> None:
    """Image, mask and edges have the canvas size; the mask is black and white, and black outside the image."""
    plan = resolve_request(replace(UPLOADED, canny=True, feather=4), OPTIONS)
    image, mask = disc(100, 60), np.full((6, 10, 3), 90, np.uint8)
    scene = lay_out_images(plan, image, mask)
    job = scene.request
    assert (scene.width, scene.height, job.width, job.height) == (100, 60, 384, 256)
    assert job.image is not None
    assert job.mask is not None
    assert job.control is not None
    assert job.image.pixels.shape == job.control.pixels.shape == (256, 384, 3)
    assert set(np.unique(job.mask.pixels)) == {0, 255}
    assert not job.mask.pixels[:12].any()
    drawn = np.full((256, 384, 3), 7, np.uint8)
    assert scene.compose_output(drawn).shape == image.shape


def test_a_scene_without_pictures_is_as_large_as_was_asked() -> None:
    """Text to image: no image, no mask, and the result is cropped from its canvas."""
    scene = lay_out_images(resolve_request(GenerationRequest(Task.TEXT_TO_IMAGE, "a red disc", 100, 128), OPTIONS))
    assert (scene.request.image, scene.request.mask, scene.request.control) == (None, None, None)
    assert scene.compose_output(np.zeros((128, 128, 3), np.uint8)).shape == (128, 100, 3)


def test_two_jobs_of_equal_pictures_are_one_drawing() -> None:
    """Digests are of pixels, so one image in two file formats is generated once."""
    plan = resolve_request(UPLOADED, OPTIONS)
    mask = np.full((60, 100, 3), 255, np.uint8)
    jobs = [lay_out_images(plan, disc(100, 60), mask.copy()).request for _ in range(2)]
    assert jobs[0].image is not None
    assert jobs[0] == replace(jobs[1])
    assert jobs[0].image.digest == jobs[1].image.digest  # type: ignore[union-attr]  # both have one


def test_other_stop_words_are_another_image() -> None:
    """They change the prompt that the model reads, so they are part of the digest. The built-in list is not."""
    request = GenerationRequest(Task.TEXT_TO_IMAGE, "a red disc", 64, 64)
    other = replace(OPTIONS, stop_words=StopWords.of("nltk", ["the"]))
    same = replace(OPTIONS, stop_words=BUILTIN_STOP_WORDS)
    digests = [resolve_request(request, options).content_digest for options in (OPTIONS, other, same)]
    assert digests[0] == digests[2] != digests[1]


def test_parameters_of_a_models_own_are_recorded_for_a_replay() -> None:
    """As JSON and back, with their types; a request without any records none."""
    options = replace(OPTIONS, models={**MODELS, "sdxl": WITH_OWN})
    asked = replace(UPLOADED, extra=(("cfg_truncation", 0.5), ("cfg_normalization", True), ("max_sequence_length", 3)))
    recorded = json.loads(json.dumps(requested_fields(resolve_request(asked, options))))
    read = TypeAdapter(GenerationRequest).validate_python(recorded)
    assert read.extra == asked.extra
    assert [type(value) for _, value in read.extra] == [float, bool, int]
    assert "extra" not in requested_fields(resolve_request(UPLOADED, options))
