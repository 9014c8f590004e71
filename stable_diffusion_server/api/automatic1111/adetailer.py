"""Reads the units of AUTOMATIC1111's ADetailer extension as repairs of details."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stable_diffusion_server.api.automatic1111.prompt_syntax import read_prompt
from stable_diffusion_server.api.dependencies import DialectContext
from stable_diffusion_server.api.schemas.validation import faults_in
from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.generation import MOST_PART_PROMPTS, MOST_REPAIRS, NAME_MAX, TEXT_MAX
from stable_diffusion_server.pipelines import ModelSpec
from stable_diffusion_server.types import DetailRepair, GenerationRequest

ADETAILER = "adetailer"
_FIELD = "alwayson_scripts"
_NEXT_PART, _WHOLE_PROMPT, _SKIPPED = "[SEP]", "[PROMPT]", "[SKIP]"
# Endings of detectors' files in the extension; here they are ONNX files of the same name.
_ENDINGS = (".pt", ".onnx", ".pth", ".safetensors")
# Arguments that are drawn as the extension's defaults, with those defaults.
_USUAL: dict[str, tuple[object, ...]] = {
    "ad_mask_merge_invert": ("None",),
    "ad_x_offset": (0,),
    "ad_y_offset": (0,),
    "ad_inpaint_only_masked": (True,),
    "ad_model_classes": ("",),
    "ad_mask_filter_method": ("Area", "Confidence"),
    "ad_mask_k": (0,),
    **dict.fromkeys(
        "ad_use_cfg_scale ad_use_checkpoint ad_use_vae ad_use_sampler ad_use_noise_multiplier ad_use_clip_skip "
        "ad_restore_face".split(),
        (False,),
    ),
    "ad_controlnet_model": ("None", "Passthrough"),
}
# Arguments that count only with one of the above.
_FOLLOWING = frozenset(
    "ad_cfg_scale ad_checkpoint ad_vae ad_sampler ad_scheduler ad_noise_multiplier ad_clip_skip ad_controlnet_module "
    "ad_controlnet_weight ad_controlnet_guidance_start ad_controlnet_guidance_end is_api".split()
)


class AdetailerUnit(BaseModel):
    """One unit of ADetailer, with its defaults."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)

    ad_model: str = Field("None", max_length=NAME_MAX)
    ad_tab_enable: bool = True
    ad_prompt: str = Field("", max_length=TEXT_MAX)
    ad_negative_prompt: str = Field("", max_length=TEXT_MAX)
    ad_confidence: float = Field(0.3, ge=0, le=1)
    ad_mask_k_largest: int = Field(0, ge=0, le=1000)
    ad_mask_min_ratio: float = Field(0.0, ge=0, le=1)
    ad_mask_max_ratio: float = Field(1.0, ge=0, le=1)
    ad_dilate_erode: int = Field(4, ge=-128, le=128)
    ad_mask_blur: int = Field(4, ge=0, le=256)
    ad_denoising_strength: float = Field(0.4, ge=0, le=1)
    ad_inpaint_only_masked_padding: int = Field(32, ge=0, le=512)
    ad_use_inpaint_width_height: bool = False
    ad_inpaint_width: int = Field(512, ge=64, le=4096)
    ad_inpaint_height: int = Field(512, ge=64, le=4096)
    ad_use_steps: bool = False
    ad_steps: int = Field(28, ge=1, le=1000)


def read_repairs(
    scripts: Mapping[str, Any], generation: GenerationRequest, spec: ModelSpec, context: DialectContext, *, edits: bool
) -> tuple[tuple[DetailRepair, ...], list[str]]:
    """Return the repairs that ADetailer's arguments ask for, and sentences about what of them has no effect.

    `edits` is whether the request has an input image. Raises `InvalidInput` for malformed arguments.
    """
    args = next((script for name, script in scripts.items() if name.lower() == ADETAILER), None)
    args = args.get("args") if isinstance(args, dict) else args
    if args in (None, []):
        return (), []
    if not isinstance(args, list):
        raise InvalidInput("alwayson_scripts.ADetailer.args must be a list.", field=_FIELD)
    flags, units = [arg for arg in args if isinstance(arg, bool)], [arg for arg in args if isinstance(arg, dict)]
    if not all(flags[:1]) or (edits and flags[1:2] == [True]):  # disabled, or not for image to image
        return (), []
    repairs: list[DetailRepair] = []
    ignored: list[str] = []
    read = [_unit(given, number) for number, given in enumerate(units[: MOST_REPAIRS + 1])]
    for unit in read[:MOST_REPAIRS]:
        if not unit.ad_tab_enable or unit.ad_model.strip().lower() in ("", "none"):
            continue
        detector = _known(unit.ad_model, context)
        if detector is None:
            ignored.append(f"ADetailer: {unit.ad_model[:50]!r} is not a detector here; see /adetailer/v1/ad_model.")
            continue
        repair, sentences = _repair(unit, detector, generation, spec)
        repairs.append(repair)
        ignored += sentences
    if len(units) > MOST_REPAIRS:
        ignored.append(f"ADetailer: units after the first {MOST_REPAIRS} are left out.")
    return tuple(repairs), list(dict.fromkeys(ignored))


def detector_names(context: DialectContext) -> list[str]:
    """Return the names of the detectors that units may name. Reads a folder."""
    return sorted(context.detector.names())


def _unit(given: Mapping[str, Any], number: int) -> AdetailerUnit:
    try:
        return AdetailerUnit.model_validate({name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        faults = [fault for _, fault in faults_in(error, AdetailerUnit)]
        sentence = " ".join(f"alwayson_scripts.ADetailer unit {number}: {fault}" for fault in faults)
        raise InvalidInput(sentence[:1000], field=_FIELD) from error


def _known(name: str, context: DialectContext) -> str | None:
    """Return the detector of a name, which may have the ending of the extension's file."""
    wanted = _stem(name)
    return next(
        (own for own in context.detector.names() if wanted in (_stem(own), _stem(own).rpartition("/")[2])), None
    )


def _stem(name: str) -> str:
    lowered = name.strip().replace("\\", "/").lower()
    ending = next((ending for ending in _ENDINGS if lowered.endswith(ending)), "")
    return lowered.removesuffix(ending)


def _repair(
    unit: AdetailerUnit, detector: str, generation: GenerationRequest, spec: ModelSpec
) -> tuple[DetailRepair, list[str]]:
    prompts, about_prompts = _texts(unit.ad_prompt, generation.prompt, "ad_prompt", spec)
    negatives, about_negatives = _texts(
        unit.ad_negative_prompt, generation.negative_prompt or "", "ad_negative_prompt", spec
    )
    repair = DetailRepair(
        detector=detector,
        prompts=prompts,
        negative_prompts=negatives,
        confidence=unit.ad_confidence,
        most=min(unit.ad_mask_k_largest, 16) or 16,
        least_area=unit.ad_mask_min_ratio,
        most_area=unit.ad_mask_max_ratio,
        strength=unit.ad_denoising_strength,
        steps=unit.ad_steps if unit.ad_use_steps else None,
        padding=unit.ad_inpaint_only_masked_padding,
        feather=unit.ad_mask_blur,
        dilation=unit.ad_dilate_erode,
        width=unit.ad_inpaint_width if unit.ad_use_inpaint_width_height else None,
        height=unit.ad_inpaint_height if unit.ad_use_inpaint_width_height else None,
    )
    extra: dict[str, Any] = unit.model_extra or {}
    odd = [
        f"ADetailer: {name[:50]} is not honoured."
        for name, value in extra.items()
        if name not in _FOLLOWING and value not in _USUAL.get(name, ()) and value not in ("", [], {})
    ]
    return repair, [*about_prompts, *about_negatives, *odd]


def _texts(text: str, whole: str, parameter: str, spec: ModelSpec) -> tuple[tuple[str, ...], list[str]]:
    """Return a text for each part, without tags of LoRAs, and sentences about what has no effect."""
    if not text.strip():
        return (), []
    given = text.split(_NEXT_PART, MOST_PART_PROMPTS)[:MOST_PART_PROMPTS]
    read = [
        read_prompt(one.replace(_WHOLE_PROMPT, whole)[:TEXT_MAX], parameter, None, weighted=spec.weighs_prompts)
        for one in given
    ]
    ignored = [sentence for one in read for sentence in one.ignored]
    if any(one.loras for one in read):
        ignored.append(f"ADetailer: LoRAs in {parameter} are left out; those of the prompt count.")
    if _SKIPPED in text:
        ignored.append(f"ADetailer: {_SKIPPED} is not honoured.")
    return tuple(one.words for one in read), ignored
