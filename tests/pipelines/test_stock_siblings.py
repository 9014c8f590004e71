"""Classes over the components of others are drawn as their own call draws, whichever of them a folder names."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_stock
from drawing import draw, largest_difference
from safetensors.numpy import save_file
from stock_families import request_of, stock_family
from stock_siblings import SIBLINGS
from test_any_class import family_of, whole_call

from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.pipelines.family_rows import family_row
from stable_diffusion_server.pipelines.library import FileIdentity, Kind
from stable_diffusion_server.pipelines.library.identity import ModelTask
from stable_diffusion_server.pipelines.owned_models import find_owned_models
from stable_diffusion_server.pipelines.stock_classes import TABLE, stock_class, why_not_drawn
from stable_diffusion_server.types import Task

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]

# Tokens by chance, as in `test_any_class`; UNets without the channels of a mask draw nothing inside of one.
_INEXACT, _MASKED = "Amused", "KandinskyV22InpaintCombinedPipeline"
_DENOISERS = ("unet", "transformer", "decoder", "image_unet")
CASES = [
    (name, task)
    for name in SIBLINGS
    for task, kind in stock_class(name).tasks.items()  # type: ignore[union-attr]  # the table has them
    if kind != _MASKED and (kind == name or kind not in SIBLINGS) and not name.startswith(_INEXACT)
]


@pytest.fixture(autouse=True)
def builders(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `family_of` and `whole_call` build from."""
    for name, build in SIBLINGS.items():
        monkeypatch.setitem(tiny_stock.FAMILIES, name, build)


@pytest.mark.parametrize(("name", "task"), CASES)
def test_a_sibling_is_drawn_as_its_own_call_draws(name: str, task: Task) -> None:
    """Difference 0; another prompt differs by more."""
    family = family_of(name)
    request = request_of(family, task, num_inference_steps=3)
    expected = whole_call(name, request)
    other = dataclasses.replace(request, prompt="a small house by the sea")
    assert largest_difference(expected, whole_call(name, other)) > 2, "the prompt must show"
    assert largest_difference(draw(family, request), expected) == 0


@pytest.mark.parametrize("name", [name for name in SIBLINGS if name.startswith(_INEXACT)])
def test_tokens_by_chance_are_a_picture(name: str) -> None:
    """Amused rounds its probabilities otherwise from call to call."""
    family = family_of(name)
    for task in family.spec.tasks:
        assert draw(family, request_of(family, task, num_inference_steps=2)).std() > 5


@pytest.mark.parametrize("name", json.loads(TABLE.read_text())["drawn"])
def test_a_folder_of_every_drawn_class_is_found(name: str, tmp_path: Path) -> None:
    """By its index and the configuration of its denoiser; none is refused by the task that its name suggests."""
    known = stock_class(name)
    assert known is not None
    folder = tmp_path / "mine"
    part = known.denoiser
    (folder / part).mkdir(parents=True)
    index = "modular_model_index.json" if known.modular else "model_index.json"
    parts: dict[str, Any] = {part: ["diffusers", "X", {}] if known.modular else ["diffusers", "X"]}
    (folder / index).write_text(json.dumps({"_class_name": name, **parts}))
    (folder / part / "config.json").write_text(json.dumps({"in_channels": 4, "cross_attention_dim": 1024}))
    save_file({"x": np.zeros(1, np.float32)}, folder / part / "diffusion_pytorch_model.safetensors")
    owned = find_owned_models(tmp_path, [tmp_path])
    if why_not_drawn(name):  # a package that may not be installed
        assert "package" in owned.refused["mine"]
        return
    assert not owned.refused
    assert owned.specs["mine"].tasks


def test_a_folder_of_a_class_for_images_draws_from_text_too() -> None:
    """Unless its UNet has the channels of a mask, or no class draws a mask with the channels that it has."""

    def tasks(kind: str, channels: int, task: ModelTask = ModelTask.NORMAL) -> set[Task]:
        found = family_row(FileIdentity(Kind.PIPELINE, ("x",), task=task, in_channels=channels, pipeline_class=kind))
        assert found is not None
        return {*found.tasks}

    usual = {Task.TEXT_TO_IMAGE, Task.IMAGE_TO_IMAGE, Task.INPAINT}
    assert tasks("StableDiffusionImg2ImgPipeline", 4) == usual
    assert tasks("StableDiffusionInpaintPipeline", 4, ModelTask.INPAINT) == usual
    assert tasks("StableDiffusionInpaintPipeline", 9, ModelTask.INPAINT) == {Task.INPAINT}
    assert tasks("KandinskyV22CombinedPipeline", 4) == usual - {Task.INPAINT}
    assert tasks("KandinskyV22InpaintCombinedPipeline", 9, ModelTask.INPAINT) == {Task.INPAINT}
    assert tasks("QwenImageEditInpaintPipeline", 64, ModelTask.EDIT) == {Task.EDIT, Task.INPAINT}


@pytest.mark.parametrize(
    ("name", "width", "height", "fields"),
    [
        ("cogview3", 192, 256, ["width", "height"]), ("cogview3", 64, 256, ["height"]),
        ("aura-flow", 320, 64, ["width"]), ("z-image", 64, 1088, ["height"]),
        ("sd3", 1088, 64, ["width"]), ("hidream", 256, 512, ["width"]),
        ("lumina2", 1088, 64, ["width"]), ("anima", 64, 512, ["height"]),
    ],
)  # fmt: skip
def test_a_size_without_positions_is_refused(name: str, width: int, height: int, fields: list[str]) -> None:
    """Naming the sides, before anything is computed; the largest that has positions is drawn."""
    family = family_of(name) if name in tiny_stock.FAMILIES else stock_family(name)
    with pytest.raises(InvalidInput) as refused:
        family.prepare(request_of(family, width=width, height=height))
    assert [field for field, _ in refused.value.faults or ((refused.value.field, ""),)] == fields
    if name == "cogview3":
        assert draw(family, request_of(family, width=128, height=128, num_inference_steps=1)).shape == (128, 128, 3)


def test_one_step_is_refused_where_the_class_cannot_take_it() -> None:
    """PixArt-α reads a value that only LCM's schedule returns then."""
    family = family_of("pixart-alpha")
    with pytest.raises(InvalidInput) as refused:
        family.prepare(request_of(family, num_inference_steps=1))
    assert refused.value.field == "num_inference_steps"
