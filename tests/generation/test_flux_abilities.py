"""What a model takes of a request beside the prompt: tasks, references, a negative prompt beside distilled guidance."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.generation.limits import RequestLimits
from stable_diffusion_server.generation.permissions import with_able_model
from stable_diffusion_server.generation.resolver import GenerationOptions, resolve_request
from stable_diffusion_server.pipelines import MODELS, FileIdentity, Kind
from stable_diffusion_server.pipelines.family_rows import family_row
from stable_diffusion_server.pipelines.library import ModelTask
from stable_diffusion_server.types import GenerationRequest, ImageInput, Task

DEV, FILL, KONTEXT = (
    family_row(FileIdentity(Kind.DENOISER, ("flux",), variant, task))
    for variant, task in (("dev", ModelTask.NORMAL), ("fill", ModelTask.FILL), ("kontext", ModelTask.EDIT))
)
OPTIONS = GenerationOptions(
    RequestLimits(),
    "dev",
    "",
    models={
        **MODELS,
        **{
            str(name): replace(row, name=name)
            for name, row in (("dev", DEV), ("fill", FILL), ("kontext", KONTEXT))
            if row
        },
    },
)
TEXT = GenerationRequest(Task.TEXT_TO_IMAGE, "a house", width=64, height=64, negative_prompt="blur")
REFERENCE = ImageInput("reference_file", data=b"image")


@pytest.mark.parametrize(("scale", "kept"), [(None, False), (1, False), (1.5, True), (20, True)])
def test_a_negative_prompt_of_dev_acts_by_its_true_guidance(scale: float | None, kept: bool) -> None:
    """Its guidance of 3.5 is an input of the model and does not switch it on; otherwise a warning says what would."""
    request = TEXT if scale is None else replace(TEXT, extra=(("true_cfg_scale", scale),))
    parameters = resolve_request(request, OPTIONS).parameters
    assert parameters.guidance_scale == 3.5
    assert (parameters.negative_prompt == "blur") is kept
    assert any("extra.true_cfg_scale" in warning.message for warning in parameters.warnings) is not kept


def test_the_other_models_keep_their_rule() -> None:
    """SDXL's negative prompt acts by guidance, and has no true guidance."""
    sdxl = replace(TEXT, model="sdxl", guidance_scale=1.0)
    assert resolve_request(sdxl, OPTIONS).parameters.warnings[0].code == "negative-prompt-ignored"
    assert resolve_request(replace(sdxl, guidance_scale=2.0), OPTIONS).parameters.negative_prompt == "blur"
    with pytest.raises(InvalidInput, match="no parameter of sdxl"):
        resolve_request(replace(sdxl, extra=(("true_cfg_scale", 3),)), OPTIONS)


@pytest.mark.parametrize("value", [0.5, 21, float("nan"), True, "3"])
def test_true_guidance_has_a_range(value: float | str) -> None:
    """1 to 20, and a number."""
    with pytest.raises(InvalidInput) as refused:
        resolve_request(replace(TEXT, extra=(("true_cfg_scale", value),)), OPTIONS)
    assert refused.value.field == "extra.true_cfg_scale"


def test_fill_and_kontext_draw_their_tasks_alone() -> None:
    """Fill repaints, Kontext edits by one reference; others are refused with the names of models that can."""
    edit = replace(TEXT, task=Task.EDIT, model="kontext", references=(REFERENCE,))
    for request, sentence in (
        (replace(TEXT, model="fill"), "fill does not draw from text alone; those that can are "),
        (replace(edit, references=(REFERENCE, REFERENCE)), "takes at most 1"),
        (replace(edit, model="dev"), "dev does not edit images by instruction; those that can are kontext"),
    ):
        with pytest.raises(InvalidInput, match=re.escape(sentence)):
            with_able_model(request, OPTIONS.models, "dev")
    assert with_able_model(replace(edit, model=None), OPTIONS.models, "dev").model == "kontext"
    assert resolve_request(edit, OPTIONS).parameters.guidance_scale == 2.5
