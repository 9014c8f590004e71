"""ADetailer's arguments become repairs of details, and what of them has no effect is told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from stable_diffusion_server.api.automatic1111.adetailer import read_repairs
from stable_diffusion_server.api.dependencies import DialectContext
from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.generation import NoDetector, RequestLimits
from stable_diffusion_server.pipelines.catalog import MODELS
from stable_diffusion_server.types import DetailRepair, GenerationRequest, Task


class TwoDetectors(NoDetector):
    """A server with two detectors."""

    def names(self) -> Sequence[str]:
        return ("face_yolov8n.onnx", "hands/hand_yolov8n.onnx")


CONTEXT = DialectContext(RequestLimits(), MODELS, "sdxl", {}, 4, 10**9, detector=TwoDetectors())
GENERATION = GenerationRequest(Task.TEXT_TO_IMAGE, "a (red:1.2) man", negative_prompt="blur")


def read(args: Any, *, edits: bool = False) -> tuple[tuple[DetailRepair, ...], list[str]]:
    return read_repairs({"ADetailer": {"args": args}}, GENERATION, MODELS["sdxl"], CONTEXT, edits=edits)


def test_a_unit_with_its_defaults() -> None:
    """Names are those of the extension's files, without regard to case and ending."""
    for name in ("face_yolov8n.pt", "FACE_yolov8n", "face_yolov8n.onnx"):
        assert read([{"ad_model": name}]) == ((DetailRepair("face_yolov8n.onnx", most=16),), [])


def test_all_arguments_of_a_unit() -> None:
    """Each has its field; prompts are divided by [SEP], and [PROMPT] is the request's prompt."""
    unit = {
        "ad_model": "hands\\hand_yolov8n.pt",
        "ad_prompt": "[PROMPT], a face [SEP] another <lora:ink:1>",
        "ad_negative_prompt": "smile",
        "ad_confidence": 0.5,
        "ad_mask_k_largest": 3,
        "ad_mask_min_ratio": 0.01,
        "ad_mask_max_ratio": 0.5,
        "ad_dilate_erode": -4,
        "ad_mask_blur": 8,
        "ad_denoising_strength": 0.3,
        "ad_inpaint_only_masked_padding": 16,
        "ad_use_inpaint_width_height": True,
        "ad_inpaint_width": 256,
        "ad_inpaint_height": 384,
        "ad_use_steps": True,
        "ad_steps": 9,
    }
    repairs, ignored = read([True, False, unit])
    assert repairs == (
        DetailRepair(
            "hands/hand_yolov8n.onnx",
            prompts=("a (red:1.2) man, a face", "another"),
            negative_prompts=("smile",),
            confidence=0.5,
            most=3,
            least_area=0.01,
            most_area=0.5,
            strength=0.3,
            steps=9,
            padding=16,
            feather=8,
            dilation=-4,
            width=256,
            height=384,
        ),
    )
    assert ignored == ["ADetailer: LoRAs in ad_prompt are left out; those of the prompt count."]


@pytest.mark.parametrize(
    ("args", "edits"),
    [
        (None, False),
        ([], False),
        ([False, False, {"ad_model": "face_yolov8n.pt"}], False),
        ([True, True, {"ad_model": "face_yolov8n.pt"}], True),
        ([True, False, {"ad_model": "None"}], False),
        ([True, False, {}], False),
        ([True, False, {"ad_model": "face_yolov8n.pt", "ad_tab_enable": False}], False),
    ],
)
def test_a_unit_that_is_off_repairs_nothing(args: Any, edits: bool) -> None:
    """Off by the first flag, for image to image by the second, by its tab, or without a detector."""
    assert read(args, edits=edits) == ((), [])


def test_an_unknown_detector_and_arguments_without_effect_are_told() -> None:
    """Neutral values, and those that count only with a switch that is off, are not."""
    unit = {"ad_model": "face_yolov8n.pt", "ad_use_sampler": True, "ad_sampler": "Euler a", "ad_restore_face": False}
    repairs, ignored = read([{"ad_model": "x" * 90}, {**unit, "ad_x_offset": 4, "ad_cfg_scale": 5, "is_api": []}])
    assert len(repairs) == 1
    assert ignored == [
        f"ADetailer: {'x' * 50!r} is not a detector here; see /adetailer/v1/ad_model.",
        "ADetailer: ad_use_sampler is not honoured.",
        "ADetailer: ad_x_offset is not honoured.",
    ]


def test_units_after_the_fourth_are_left_out() -> None:
    """Of a million units five are read."""
    repairs, ignored = read([{"ad_model": "face_yolov8n.pt"}] * 1_000_000)
    assert (len(repairs), len(ignored)) == (4, 1)


@pytest.mark.parametrize(
    "args",
    [
        "face",
        7,
        {"ad_model": "face_yolov8n.pt"},
        [{"ad_model": 7}],
        [{"ad_model": "a" * 201}],
        [{"ad_model": "face_yolov8n.pt", "ad_confidence": 2}],
        [{"ad_model": "face_yolov8n.pt", "ad_confidence": "nan"}],
        [{"ad_model": "face_yolov8n.pt", "ad_steps": 10**30}],
        [{"ad_model": "face_yolov8n.pt", "ad_prompt": ["x"]}],
        [{"ad_model": "face_yolov8n.pt", "ad_prompt": "x" * 32_001}],
        [{"ad_model": "face_yolov8n.pt", "ad_mask_blur": -1}],
    ],
)
def test_malformed_arguments_are_refused(args: Any) -> None:
    """With the parameter that they are in."""
    with pytest.raises(InvalidInput) as refused:
        read(args)
    assert refused.value.field == "alwayson_scripts"
    assert len(refused.value.detail) < 1200


def test_a_long_prompt_of_separators_takes_sixteen_texts() -> None:
    """6,400 of them are read in linear time."""
    repairs, _ = read([{"ad_model": "face_yolov8n.pt", "ad_prompt": "[SEP]" * 6400}])
    assert len(repairs[0].prompts) == 16


def test_prompts_of_a_plain_model_lose_their_weights() -> None:
    """As those of the request do."""
    spec = replace(MODELS["sdxl"], weighs_prompts=False)
    unit = {"ad_model": "face_yolov8n.pt", "ad_prompt": "(a face:1.3)"}
    repairs, ignored = read_repairs({"adetailer": [unit]}, GENERATION, spec, CONTEXT, edits=False)
    assert repairs[0].prompts == ("a face",)
    assert len(ignored) == 1
