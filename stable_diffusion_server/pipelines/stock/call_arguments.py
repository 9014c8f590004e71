"""What a request becomes as arguments of a stock pipeline's call, and which parameters of its own the class has."""

from __future__ import annotations

import inspect
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from types import UnionType
from typing import Any

import numpy as np
import torch
from PIL import Image

from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.pipelines.model_spec import ModelSpec, known_names
from stable_diffusion_server.types import DiffusionRequest, ExtraValue, ImageArray, Task

_SIMPLE = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
# Set here, or left as the class has them: what decides the number, size and kind of what is returned.
_OURS = frozenset(
    "self prompt negative_prompt image mask_image strength height width num_inference_steps generator output_type "
    "return_dict num_images_per_prompt callback callback_steps callback_on_step_end use_resolution_binning max_area "
    "callback_on_step_end_tensor_inputs padding_mask_crop max_pixels resolution batch_size clean_caption".split()
)
# Whole numbers and fractions of the caller's, and characters of a text.
_MOST_INTEGER, _MOST_NUMBER, _LONGEST_TEXT = 100_000, 10_000.0, 200
# The ratio of sides that Qwen2-VL's processor takes.
_LONGEST = 200


@dataclass(frozen=True)
class CallParameters:
    """The parameters that a pipeline class's `__call__` names, without `**kwargs`; `extra` are those for requests."""

    class_name: str
    names: frozenset[str]
    guidance: str
    extra: Mapping[str, frozenset[type]]

    @classmethod
    def of(cls, pipeline_class: type) -> CallParameters:
        """Read the signature of a class."""
        call: Any = pipeline_class.__call__
        variable = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        listed = {name: one for name, one in inspect.signature(call).parameters.items() if one.kind not in variable}
        hints = typing.get_type_hints(call)
        # Qwen-Image: guidance is the true one, and `guidance_scale` is for models distilled with it.
        distilled = "guidance_scale" in listed and listed["guidance_scale"].default is not None
        guidance = next((name for name in ("true_cfg_scale", "guidance_scale") if name in listed), "")
        guidance = "guidance_scale" if distilled else guidance
        simple = {name: _simple_types(hints.get(name, one.annotation)) for name, one in listed.items()}
        return cls(
            pipeline_class.__name__,
            frozenset(listed),
            guidance,
            {
                name: types
                for name, types in simple.items()
                # A further prompt would pass by the rules for prompts.
                if types
                and name not in _OURS
                and name != guidance
                and not name.startswith("_")
                and "prompt" not in name
            },
        )

    def checked_extra(self, request: DiffusionRequest, spec: ModelSpec) -> dict[str, ExtraValue]:
        """The request's parameters of the class's own. Raises `InvalidInput` naming each wrong one."""
        faults = [
            (f"extra.{name}"[:120], why) for name, value in request.extra if (why := self._fault(name, value, spec))
        ]
        if faults:
            raise InvalidInput.from_faults(faults)
        return {
            name: float(value) if type(value) is int and int not in self.extra[name] else value
            for name, value in request.extra
        }

    def _fault(self, name: str, value: ExtraValue, spec: ModelSpec) -> str:
        """What is wrong with a parameter, as a sentence; empty if nothing is."""
        field = f"extra.{name[:100]}"
        types = self.extra.get(name)
        if types is None:
            there = known_names(name, sorted(self.extra)) if self.extra else "it has none of its own"
            return f"{name[:100]!r} is no parameter of {spec.name} ({self.class_name}); {there}."
        given = type(value)
        if given not in types and not (given is int and float in types):
            return f"{field} must be {' or '.join(sorted(_SIMPLE[one] for one in types))}."
        if isinstance(value, str):
            return f"{field} has more than {_LONGEST_TEXT} characters." if len(value) > _LONGEST_TEXT else ""
        if given is bool:
            return ""
        if name == "max_sequence_length" and not 1 <= value <= spec.text_tokens:
            return f"{field} must be from 1 to {spec.text_tokens}."
        most = _MOST_INTEGER if given is int else _MOST_NUMBER
        if not math.isfinite(value) or abs(value) > most:
            return f"{field} must be from {-most:g} to {most:g}."
        return ""


def _simple_types(hint: Any) -> frozenset[type]:
    """The types of a parameter if all are simple; empty for callables, tensors, lists and whatever else."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, UnionType) else (hint,)
    types = [one for one in options if one is not type(None)]
    return frozenset(types) if types and all(one in _SIMPLE for one in types) else frozenset()


def call_arguments(
    request: DiffusionRequest, spec: ModelSpec, parameters: CallParameters, *, latent: bool
) -> dict[str, Any]:
    """The arguments of the call that draws a request; with `latent` it returns latents, otherwise pixels.

    Raises `InvalidInput` for what the class does not take.
    """
    refused = [
        (field, f"{spec.name} is drawn by {parameters.class_name}, which takes no {what}.")
        for field, what, given in (
            ("lora", "LoRAs here", bool(request.loras)),
            ("refine", "second pass", request.refine),
            ("canny", "edges", request.control is not None),
            ("negative_prompt", "negative prompt", bool(request.negative_prompt) and not spec.takes_negative_prompt),
        )
        if given
    ]
    if refused:
        raise InvalidInput.from_faults(refused)
    given: dict[str, Any] = {
        "prompt": request.prompt,
        "negative_prompt": _negative_prompt(request, spec, parameters),
        "height": request.height,
        "width": request.width,
        "num_inference_steps": request.num_inference_steps,
        "max_sequence_length": spec.text_tokens,
        "generator": torch.Generator("cpu").manual_seed(request.seed),
        "output_type": "latent" if latent else "np",
        # Sizes are ours: the class is to draw the one that is asked for.
        "use_resolution_binning": False,
        "clean_caption": False,  # needs packages that are no dependencies, and changes prompts where they are there
        "_auto_resize": False,
        "max_area": request.width * request.height,
        **_pictures(request),
    }
    if spec.takes_guidance:
        given[parameters.guidance] = request.guidance_scale
    given |= parameters.checked_extra(request, spec)
    known = {name: value for name, value in given.items() if name in parameters.names and value is not None}
    return known if "callback_on_step_end" in parameters.names else {**known, "old_callback": True}


def _negative_prompt(request: DiffusionRequest, spec: ModelSpec, parameters: CallParameters) -> str | None:
    """Without a negative prompt `true_cfg_scale` has no effect; the model cards of Qwen-Image give " "."""
    true_guidance = parameters.guidance == "true_cfg_scale" and request.guidance_scale > 1
    return request.negative_prompt or (" " if true_guidance and spec.takes_negative_prompt else None)


def _pictures(request: DiffusionRequest) -> dict[str, Any]:
    if request.task is Task.EDIT:
        references = [_reference(*numbered) for numbered in enumerate(request.references)]
        return {"image": references if len(references) > 1 else references[0]}
    if request.image is None:
        return {}
    # A strength that leaves no step draws one, where that is wanted at all.
    given: dict[str, Any] = {"image": _as_pil(request.image)}
    given["strength"] = max(request.strength, 1 / request.num_inference_steps)
    return given if request.mask is None else {**given, "mask_image": _as_pil(request.mask)}


def _reference(number: int, image: ImageArray) -> Image.Image:
    """Raises `InvalidInput` for one that Qwen2-VL's processor refuses, which no class here takes."""
    height, width = image.pixels.shape[:2]
    if max(height, width) > _LONGEST * min(height, width):
        sentence = f"The longer side of a reference image is at most {_LONGEST} times the shorter; one has "
        raise InvalidInput(f"{sentence}{width} × {height}.", field=f"references[{number}]")
    return _as_pil(image)


def _as_pil(image: ImageArray) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(image.pixels))
