"""Qwen-Image's edits without torchvision: our processor, one or several references, from a folder in MODELS_DIR."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny_families
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus
from drawing import draw
from stock_families import direct_call, picture, request_of
from transformers import Qwen2VLImageProcessorPil

from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.pipelines.loading.loader import LoadOptions
from stable_diffusion_server.pipelines.loading.vision_processor import PictureProcessor
from stable_diffusion_server.pipelines.owned_models import find_owned_models
from stable_diffusion_server.pipelines.registry import Registry, load
from stable_diffusion_server.types import ImageArray, Task

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]

TRUE = {"true_cfg_scale": 4.0, "negative_prompt": " "}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folders over the same weights: the class for one reference, and that for several."""
    models = tmp_path_factory.mktemp("models")
    for name in ("QwenImageEdit", "QwenImageEditPlus"):
        pipeline = tiny_families.build("qwen-image")
        pipeline.save_pretrained(models / name)
        images = Qwen2VLImageProcessorPil(min_pixels=28 * 28 * 4, max_pixels=28 * 28 * 16)
        images.save_pretrained(models / name / "processor")
        pipeline.tokenizer.save_pretrained(models / name / "processor")
        index = models / name / "model_index.json"
        said = {"_class_name": f"{name}Pipeline", "processor": ["transformers", "Qwen2VLProcessor"]}
        index.write_text(json.dumps({**json.loads(index.read_text()), **said}))
        (models / f"{name}.toml").write_text('native_size = 128\ndtype = "float32"\n')
    return models


def test_an_edit_is_drawn_as_its_class_draws_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, with two references in order; another one, their other order or another prompt is another picture."""
    monkeypatch.setattr(pipeline_qwenimage_edit_plus, "VAE_IMAGE_SIZE", 64 * 64)
    registry, family, revision = _loaded(folder, "QwenImageEditPlus")
    given = (picture(3), picture(4))
    request = request_of(family, Task.EDIT, references=given, revision=revision, num_inference_steps=2)
    parts = family.pipeline.components
    assert isinstance(parts["processor"], PictureProcessor)
    oracle = diffusers.QwenImageEditPlusPipeline(**parts)
    ours, stock = draw(registry, request), direct_call(oracle, request, **TRUE)
    assert ours.shape == (64, 64, 3)
    assert (ours == stock).all()
    for other in ({"references": (given[0], picture(9))}, {"references": given[::-1]}, {"prompt": "turn the sky dark"}):
        assert (draw(registry, replace(request, **other)) != stock).any(), other


def test_a_reference_that_is_too_narrow_is_named(folder: Path) -> None:
    """The second of two, which Qwen2-VL's processor would refuse; 200 times as long as wide is drawn."""
    registry, family, revision = _loaded(folder, "QwenImageEditPlus")
    lines = [ImageArray(np.full((2 * ratio, 2, 3), 90, np.uint8)) for ratio in (200, 201)]
    request = request_of(family, Task.EDIT, references=(picture(3), lines[1]), revision=revision, num_inference_steps=1)
    with pytest.raises(InvalidInput) as refused:
        registry.prepare(request)
    assert refused.value.field == "references[1]"
    registry.prepare(replace(request, references=(picture(3), lines[0])))


def test_a_class_that_edits_draws_nothing_from_text_alone(folder: Path) -> None:
    """It has no other task."""
    _, family, _ = _loaded(folder, "QwenImageEdit")
    with pytest.raises(InvalidInput):
        family.prepare(request_of(family))


def _loaded(folder: Path, name: str) -> tuple[Registry, Any, str]:
    spec = find_owned_models(folder, [folder]).specs[name]
    registry = load(folder, "cpu", 1, LoadOptions(models={name: spec}))
    return registry, registry.residents[name].family, registry.residents[name].spec.revision


def test_a_pictures_token_is_repeated_for_its_patches(folder: Path) -> None:
    """Once for four patches, in order; texts of a batch have their own pictures."""
    processor = PictureProcessor.from_folder(folder / "QwenImageEdit" / "processor")
    images = [tiny_families.picture(side) for side in (56, 112)]
    text = "<|vision_start|><|image_pad|><|vision_end|>"
    given = processor(text=[f"one {text}", f"two {text}"], images=images)
    number = processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    counts = [int((row == number).sum()) for row in given["input_ids"]]
    assert counts == [int(grid.prod() // 4) for grid in given["image_grid_thw"]]
    assert counts[1] > counts[0] > 1
    assert given["pixel_values"].shape[0] == 4 * sum(counts)
    assert processor(text="none")["input_ids"].shape[0] == 1
