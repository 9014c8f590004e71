"""The parameters that the call of a diffusers pipeline takes, and the check of those that a request gives by name."""

from __future__ import annotations

import math
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import UnionType
from typing import Any

from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.pipelines.model_spec import TRUE_GUIDANCE, ModelSpec, known_names
from stable_diffusion_server.types import ExtraValue

SIMPLE: Mapping[type, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
# Set here, or left as the class has them: what decides the number, size and kind of what is returned.
_OURS = frozenset(
    "self prompt negative_prompt image mask_image strength height width num_inference_steps generator output_type "
    "return_dict num_images_per_prompt callback callback_steps callback_on_step_end use_resolution_binning max_area "
    "callback_on_step_end_tensor_inputs padding_mask_crop max_pixels resolution batch_size clean_caption dtype "
    "num_layers output_resolution use_kv_cache max_new_tokens".split()
)
# Whole numbers and fractions of the caller's, and characters of a text. Other steps than ours take time as ours do.
_MOST_INTEGER, _MOST_NUMBER, _LONGEST_TEXT, _MOST_STEPS = 100_000, 10_000.0, 200, 200


@dataclass(frozen=True)
class CallParameters:
    """The parameters that a pipeline class's `__call__` names, without `**kwargs`; `extra` are those for requests."""

    class_name: str
    names: frozenset[str]
    guidance: str
    extra: Mapping[str, frozenset[type]]

    @classmethod
    def of(cls, class_name: str, types: Mapping[str, frozenset[type]], defaults: Mapping[str, float]) -> CallParameters:
        """Of the call of a class: the simple types of its parameters (none for others), and defaults that are numbers.

        With a guider, a component of modular pipelines, guidance is that of the guider and no argument.
        """
        # Qwen-Image: guidance is the true one, and `guidance_scale` is for models distilled with it.
        found = (name for name in (TRUE_GUIDANCE, "guidance_scale", "prior_guidance_scale") if name in types)
        guidance = "guidance_scale" if "guidance_scale" in defaults else next(found, "")
        # A further prompt would pass by the rules for prompts.
        extra = {
            name: kinds
            for name, kinds in types.items()
            if kinds and name not in _OURS and name != guidance and not name.startswith("_") and "prompt" not in name
        }
        return cls(class_name, frozenset(types), guidance, extra)

    def checked_extra(self, extra: Iterable[tuple[str, ExtraValue]], spec: ModelSpec) -> dict[str, ExtraValue]:
        """The request's parameters of the class's own. Raises `InvalidInput` naming each wrong one."""
        given = tuple(extra)
        faults = [(f"extra.{name}"[:120], why) for name, value in given if (why := self._fault(name, value, spec))]
        if faults:
            raise InvalidInput.from_faults(faults)
        return {
            name: float(value) if type(value) is int and int not in self.extra[name] else value for name, value in given
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
            return f"{field} must be {' or '.join(sorted(SIMPLE[one] for one in types))}."
        if isinstance(value, str):
            return f"{field} has more than {_LONGEST_TEXT} characters." if len(value) > _LONGEST_TEXT else ""
        if given is bool:
            return ""
        if name == "max_sequence_length" and not 1 <= value <= spec.text_tokens:
            return f"{field} must be from 1 to {spec.text_tokens}."
        if name.endswith("num_inference_steps") and not 1 <= value <= _MOST_STEPS:
            return f"{field} must be from 1 to {_MOST_STEPS}."
        most = _MOST_INTEGER if given is int else _MOST_NUMBER
        if not math.isfinite(value) or abs(value) > most:
            return f"{field} must be from {-most:g} to {most:g}."
        return ""


def simple_types(hint: Any) -> frozenset[type]:
    """The types of a parameter if all are simple; empty for callables, tensors, lists and whatever else."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, UnionType) else (hint,)
    types = [one for one in options if one is not type(None)]
    return frozenset(types) if types and all(one in SIMPLE for one in types) else frozenset()
