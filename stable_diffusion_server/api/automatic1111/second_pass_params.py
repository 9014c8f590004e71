"""AUTOMATIC1111's hires fix: the size of the second pass and its parameters, with sentences about ignored ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from stable_diffusion_server.api.automatic1111.prompt_expansion import has_hires
from stable_diffusion_server.api.automatic1111.sampler_names import sampler_for
from stable_diffusion_server.api.automatic1111.task_params import Txt2Img
from stable_diffusion_server.api.dependencies import DialectContext
from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.generation import latent_resize
from stable_diffusion_server.pipelines import ModelSpec
from stable_diffusion_server.types import Task

_DEFAULT_SCALE = 2.0
_LARGEST = 1_000_000
# Names that mean Lanczos, or leave the choice to the server.
_LANCZOS = frozenset({"", "lanczos", "none", "automatic"})
_IGNORED = ("hr_checkpoint_name", "hr_additional_modules", "hr_resize_mode", "hr_resize_context")
_NEUTRAL: tuple[object, ...] = (None, "", [], "Use same checkpoint", ["Use same choices"], 0)
_SAME = frozenset({"", "use same sampler", "use same scheduler"})


@dataclass(frozen=True, slots=True)
class SecondPass:
    """The second pass: its size in pixels, and the fields of a request that say how it is drawn, without its words."""

    width: int
    height: int
    fields: dict[str, Any]
    ignored: list[str]


def parse_second_pass(
    params: Txt2Img, width: int, height: int, spec: ModelSpec, context: DialectContext
) -> SecondPass | None:
    """Return the second pass of an image of `width` × `height` pixels; `None` without hires fix. Reads files.

    Raises `InvalidInput` naming the parameters if its size is out of the limits.
    """
    if not has_hires(params):
        return None
    wide, high = _size(params, width, height, context)
    steps = spec.default_steps if params.steps is None else params.steps
    own_strength = params.model_extra.get("hr_denoising_strength")  # SD.Next's
    strength = own_strength if isinstance(own_strength, int | float) else params.denoising_strength
    upscaler, about_upscaler = _upscaler(params.hr_upscaler or "", spec, context)
    sampler, about_sampler = _sampler(params, spec)
    fields = {
        "hires_width": wide,
        "hires_height": high,
        "hires_steps": params.hr_second_pass_steps or steps,
        "hires_strength": 0.75 if strength is None else float(strength),
        "hires_upscaler": upscaler,
        # 1 is what clients of Forge send to leave it as it is.
        "hires_guidance": params.hr_cfg if params.hr_cfg not in (None, 1) else None,
        **sampler,
    }
    extra = params.model_extra
    unused = [f"{name} is not honoured." for name in _IGNORED if extra.get(name) not in _NEUTRAL]
    return SecondPass(wide, high, fields, [*about_upscaler, *about_sampler, *unused])


def _size(params: Txt2Img, width: int, height: int, context: DialectContext) -> tuple[int, int]:
    # Bounded before the arithmetic: Python writes no number of more than 4300 digits into the sentence below.
    asked = (min(params.hr_resize_x or 0, _LARGEST), min(params.hr_resize_y or 0, _LARGEST))
    if asked == (0, 0):
        scale, names = _DEFAULT_SCALE if params.hr_scale is None else params.hr_scale, ["hr_scale"]
        sides = [int(min(max(scale, 0), _LARGEST) * side) for side in (width, height)]
    else:
        names = [name for name, side in zip(("hr_resize_x", "hr_resize_y"), asked, strict=True) if side]
        sides = [asked[0] or asked[1] * width // height, asked[1] or asked[0] * height // width]
    low, high = context.limits.bounds()["hires_width"]
    if not all(low <= side <= high for side in sides):
        sentence = f"The second pass has {sides[0]} × {sides[1]} pixels; a side must be between {low:g} and {high:g}."
        raise InvalidInput.from_faults([(name, sentence) for name in names])
    return sides[0], sides[1]


def _upscaler(asked: str, spec: ModelSpec, context: DialectContext) -> tuple[str | None, list[str]]:
    """Return the upscaler of a name, `None` for Lanczos, which also stands for what cannot be used, and sentences."""
    name = asked.strip()
    if name.lower() in _LANCZOS:
        return None, []
    if (way := latent_resize(name)) is not None:
        if spec.any_extra or Task.IMAGE_TO_IMAGE not in spec.tasks:
            return None, [f"hr_upscaler: {spec.name} takes no latents. Lanczos enlarges the image."]
        return way.value, []
    try:
        return context.upscaler.find(name, "hr_upscaler").name, []
    except InvalidInput as error:
        return None, [f"hr_upscaler: {error.detail} Lanczos enlarges the image."]


def _sampler(params: Txt2Img, spec: ModelSpec) -> tuple[dict[str, Any], list[str]]:
    """Return scheduler and schedule of the second pass, as far as they are not those of the first, and sentences."""
    named = (params.hr_sampler_name or "", params.hr_scheduler or "")
    sampler, schedule = ("" if text.strip().lower() in _SAME else text for text in named)
    if not sampler and not schedule:
        return {}, []
    first = params.sampler_name or params.sampler_index or ""
    chosen = sampler_for(sampler or first, schedule, spec)
    fields: dict[str, Any] = {"hires_scheduler": chosen.scheduler or spec.default_scheduler} if sampler else {}
    if schedule or chosen.schedule:
        fields["hires_schedule"] = chosen.schedule or "automatic"
    return fields, [f"hr_sampler_name: {sentence}" for sentence in chosen.ignored]
