"""Newer classes and those with a UNet of SDXL are drawn as their own call draws; what needs a package is refused."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_stock
from diffusers.pipelines.prx import pipeline_prx, pipeline_prx_pixel
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_inpaint
from drawing import draw, largest_difference
from stock_families import request_of
from test_any_class import family_of, whole_call
from tiny_newer import NEWER, fibo
from tiny_parts import SIDE

from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.pipelines.loading.loader import LoadOptions
from stable_diffusion_server.pipelines.owned_models import find_owned_models
from stable_diffusion_server.pipelines.registry import load
from stable_diffusion_server.pipelines.stock_classes import stock_class
from stable_diffusion_server.types import Task

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]

# Two stages, whose sizes are multiples of 128.
_STAGES = ("StableCascadeCombinedPipeline", "WuerstchenCombinedPipeline")
# SigLIP's input is bfloat16 whatever its weights are, so that references of Z-Image Omni need such weights.
_HALVES = {("ZImageOmniPipeline", Task.EDIT)}
CASES = [
    (name, task)
    for name in NEWER
    for task, kind in stock_class(name).tasks.items()  # type: ignore[union-attr]  # the table has them
    if (kind == name or kind not in NEWER) and (name, task) not in _HALVES
]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The builders; references of Qwen-Image's edits at the size of the picture; PRX without its further package."""
    for name, build in NEWER.items():
        monkeypatch.setitem(tiny_stock.FAMILIES, name, build)
    for module in (pipeline_qwenimage_edit, pipeline_qwenimage_edit_inpaint):
        sizes = module.calculate_dimensions
        monkeypatch.setattr(module, "calculate_dimensions", lambda _, ratio, of=sizes: of(SIDE**2, ratio))
    for module in (pipeline_prx, pipeline_prx_pixel):
        monkeypatch.setattr(module, "ftfy", SimpleNamespace(fix_text=str), raising=False)


@pytest.mark.parametrize(("name", "task"), CASES)
def test_a_newer_class_is_drawn_as_its_own_call_draws(name: str, task: Task) -> None:
    """To 2 of 255; another prompt differs by more."""
    family = family_of(name)
    side = 2 * SIDE if name in _STAGES else SIDE
    request = request_of(family, task, num_inference_steps=3, width=side, height=side)
    if task not in family.spec.tasks:
        pytest.skip("not of its row")
    expected = whole_call(name, request)
    other = dataclasses.replace(request, prompt="a small house by the sea")
    assert largest_difference(expected, whole_call(name, other)) > 2, "the prompt must show"
    ours = draw(family, request)
    assert ours.shape == expected.shape == (side, side, 3)
    assert largest_difference(ours, expected) <= 2


@pytest.mark.parametrize("name", _STAGES)
def test_a_folder_of_two_stages_is_loaded_and_drawn(name: str, tmp_path: Path) -> None:
    """Its network of pixels is beside a pipeline class in diffusers, at another place than the index names."""
    tiny_stock.build(name).save_pretrained(tmp_path / "mine")
    (tmp_path / "mine.toml").write_text(f'native_size = {4 * SIDE}\ndtype = "float32"\n')
    owned = find_owned_models(tmp_path, [tmp_path])
    registry = load(tmp_path, "cpu", 1, LoadOptions(models={"mine": owned.specs["mine"]}))
    loaded = registry.residents["mine"]
    sizes = {"width": 2 * SIDE, "height": 2 * SIDE, "num_inference_steps": 3, "revision": loaded.spec.revision}
    request = request_of(loaded.family, **sizes)  # type: ignore[arg-type]  # it is the stock family
    assert largest_difference(draw(registry, request), whole_call(name, request)) <= 2


def test_a_size_that_two_stages_would_round_is_refused() -> None:
    """Both sides are named; Stable Cascade would fail within its second stage."""
    family = family_of("StableCascadeCombinedPipeline")
    with pytest.raises(InvalidInput) as refused:
        family.prepare(request_of(family, width=192, height=320))
    assert [field for field, _ in refused.value.faults] == ["width", "height"]


def test_a_prompt_that_the_class_refuses_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fibo's edits are written as JSON; the sentence does not repeat the prompt."""
    monkeypatch.setitem(tiny_stock.FAMILIES, "fibo-edit", lambda: fibo("BriaFiboEditPipeline"))
    family = family_of("fibo-edit")
    with pytest.raises(InvalidInput) as refused:
        family.prepare(request_of(family, Task.EDIT))
    assert refused.value.field == "prompt"
    assert "circle" not in refused.value.detail


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("PRXPipeline", "ftfy"), ("OmniGenPipeline", "torchvision"), ("KolorsPipeline", "sentencepiece"),
        ("Cosmos2TextToImagePipeline", "cosmos_guardrail"),
    ],
)  # fmt: skip
def test_a_class_without_its_package_is_refused_by_name(
    name: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the folder is found, not with a request."""
    known = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda one, *more: None if one == package else known(one, *more))
    (tmp_path / "mine" / "transformer").mkdir(parents=True)
    index: dict[str, Any] = {"_class_name": name, "transformer": ["diffusers", "X"]}
    (tmp_path / "mine" / "model_index.json").write_text(json.dumps(index))
    said = find_owned_models(tmp_path, [tmp_path]).refused["mine"]
    assert (
        said
        == f"mine is a folder of the class {name}, which needs the Python package {package}, which is not installed."
    )
