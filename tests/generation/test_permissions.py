"""A request gets a model that draws its task, among those its caller may use; others are refused by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from stable_diffusion_server.errors import Forbidden, InvalidInput
from stable_diffusion_server.generation.layout import lay_out_images
from stable_diffusion_server.generation.limits import RequestLimits
from stable_diffusion_server.generation.permissions import permitted_request, with_able_model
from stable_diffusion_server.generation.resolver import GenerationOptions, resolve_request
from stable_diffusion_server.pipelines import MODELS, ModelTable
from stable_diffusion_server.types import Caller, GenerationRequest, ImageInput, Task

EDITOR = replace(MODELS["flux"], name="editor", tasks=(Task.TEXT_TO_IMAGE, Task.EDIT), max_references=2)
FILLER = replace(MODELS["flux"], name="filler", tasks=(Task.INPAINT,))
MODELS_HERE = ModelTable({"filler": FILLER, "sdxl": MODELS["sdxl"], "editor": EDITOR}, {"ed": "editor"})
IMAGES = tuple(ImageInput(f"image_file[{number}]", data=b"") for number in range(3))


def order(task: Task, count: int = 0, **changes: Any) -> GenerationRequest:
    return GenerationRequest(task, "a red disc", references=IMAGES[:count], **changes)


@pytest.mark.parametrize(
    ("task", "default", "chosen"),
    [
        (Task.TEXT_TO_IMAGE, "sdxl", None),
        (Task.TEXT_TO_IMAGE, "filler", "sdxl"),
        (Task.TEXT_TO_IMAGE, "lost", "sdxl"),
        (Task.EDIT, "sdxl", "editor"),
        (Task.EDIT, "editor", None),
        (Task.INPAINT, "editor", "filler"),
    ],
)
def test_a_request_without_a_model_gets_one_that_draws_it(task: Task, default: str, chosen: str | None) -> None:
    """The default if it can, otherwise the first that can."""
    assert with_able_model(order(task), MODELS_HERE, default).model == chosen


def test_a_model_that_takes_all_images_is_chosen_before_others() -> None:
    """The first by name takes one; where none takes all, the first says how many it takes."""
    single = replace(EDITOR, name="single", max_references=1)
    models = ModelTable({"single": single, **MODELS_HERE})
    assert with_able_model(order(Task.EDIT, 1), models, "sdxl").model == "single"
    assert with_able_model(order(Task.EDIT, 2), models, "sdxl").model == "editor"
    with pytest.raises(InvalidInput, match="single takes at most 1, and 3"):
        with_able_model(order(Task.EDIT, 3), models, "sdxl")


def test_a_named_model_is_never_replaced() -> None:
    """By its name or an alias: refused, with the names of those that can."""
    for name, task, able in (("sdxl", Task.EDIT, "editor"), ("ed", Task.INPAINT, "filler, sdxl")):
        with pytest.raises(InvalidInput, match=able) as refused:
            with_able_model(order(task, model=name), MODELS_HERE, "sdxl")
        assert refused.value.field == "model"
    only = ModelTable({"sdxl": MODELS["sdxl"]})
    with pytest.raises(InvalidInput, match="no model here can edit"):
        with_able_model(order(Task.EDIT), only, "sdxl")


def test_a_model_takes_so_many_references() -> None:
    """Two of two are taken; the third is refused by its own name; a model that takes none says so."""
    assert with_able_model(order(Task.EDIT, 2), MODELS_HERE, "editor").references == IMAGES[:2]
    with pytest.raises(InvalidInput, match="at most 2, and 3") as refused:
        with_able_model(order(Task.EDIT, 3), MODELS_HERE, "editor")
    assert refused.value.field == "image_file[2]"
    with pytest.raises(InvalidInput, match="no reference image"):
        with_able_model(order(Task.TEXT_TO_IMAGE, 1, model="sdxl"), MODELS_HERE, "sdxl")


def test_a_limited_key_learns_of_its_own_models_only() -> None:
    """Neither chosen for it nor named to it."""
    options = GenerationOptions(RequestLimits(), "sdxl", "", models=MODELS_HERE)
    limited = Caller("ann", models=("sdxl", "filler"))
    with pytest.raises(InvalidInput, match="no model here can edit") as refused:
        permitted_request(order(Task.EDIT), limited, options)
    assert "editor" not in refused.value.detail
    with pytest.raises(Forbidden):
        permitted_request(order(Task.EDIT, model="editor"), limited, options)
    assert permitted_request(order(Task.INPAINT, model="filler"), limited, options).model == "filler"


@pytest.mark.parametrize(
    ("size", "kept"), [((64, 64), (64, 64)), ((64, 65), (63, 64)), ((400, 100), (128, 32)), ((1, 40_000), (1, 12_800))]
)
def test_a_waiting_edit_holds_no_more_than_the_model_reads(size: tuple[int, int], kept: tuple[int, int]) -> None:
    """References over the model's area are shrunk at once, in proportion; the output has the first one's size."""
    spec = replace(EDITOR, reference_pixels=64 * 64, native_pixels=128 * 128, min_side=64)
    options = GenerationOptions(RequestLimits(), "editor", "", models={"editor": spec})
    resolved = resolve_request(order(Task.EDIT, 1), options)
    layout = lay_out_images(resolved, references=[np.zeros((*size, 3), np.uint8)])
    (held,) = layout.request.references
    assert held.pixels.shape[:2] == kept
    assert (layout.height, layout.width) == size
