"""AUTOMATIC1111's hires fix: the size of the second pass and its parameters, with sentences about ignored ones."""

from __future__ import annotations

from dataclasses import dataclass

from stable_diffusion_server.api.automatic1111.task_params import Txt2Img
from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.generation import RequestLimits

_DEFAULT_SCALE = 2.0
_LARGEST = 1_000_000
# Upscalers that need no warning: Lanczos, and names that leave the choice to the server.
_UPSCALERS = frozenset({"", "lanczos", "none", "automatic"})
_IGNORED = (
    "hr_checkpoint_name",
    "hr_sampler_name",
    "hr_scheduler",
    "hr_prompt",
    "hr_negative_prompt",
    "hr_cfg",
    "hr_additional_modules",
)
_NEUTRAL: tuple[object, ...] = (None, "", [], "Use same checkpoint", "Use same sampler", "Use same scheduler", 1, 1.0)


@dataclass(frozen=True, slots=True)
class SecondPass:
    """The second pass: its size in pixels, its steps (`None`: those of the first pass) and its strength, 0..1."""

    width: int
    height: int
    steps: int | None
    strength: float
    ignored: list[str]


def parse_second_pass(params: Txt2Img, width: int, height: int, limits: RequestLimits) -> SecondPass | None:
    """Return the second pass of an image of `width` × `height` pixels; `None` without hires fix.

    Raises `InvalidInput` naming the parameters if its size is out of the limits.
    """
    if not params.enable_hr:
        return None
    # Bounded before the arithmetic: Python writes no number of more than 4300 digits into the sentence below.
    asked = (min(params.hr_resize_x or 0, _LARGEST), min(params.hr_resize_y or 0, _LARGEST))
    if asked == (0, 0):
        scale, names = _DEFAULT_SCALE if params.hr_scale is None else params.hr_scale, ["hr_scale"]
        sides = [int(min(max(scale, 0), _LARGEST) * side) for side in (width, height)]
    else:
        names = [name for name, side in zip(("hr_resize_x", "hr_resize_y"), asked, strict=True) if side]
        sides = [asked[0] or asked[1] * width // height, asked[1] or asked[0] * height // width]
    low, high = limits.bounds()["hires_width"]
    if not all(low <= side <= high for side in sides):
        sentence = f"The second pass has {sides[0]} × {sides[1]} pixels; a side must be between {low:g} and {high:g}."
        raise InvalidInput.from_faults([(name, sentence) for name in names])
    strength = 0.75 if params.denoising_strength is None else params.denoising_strength
    return SecondPass(sides[0], sides[1], params.hr_second_pass_steps or None, strength, _sentences(params))


def _sentences(params: Txt2Img) -> list[str]:
    upscaler = (params.hr_upscaler or "").strip()
    ignored = []
    if upscaler.lower() not in _UPSCALERS:
        ignored.append(f"hr_upscaler: {upscaler[:50]} is replaced by Lanczos.")
    extra = params.model_extra
    return [*ignored, *(f"{name} is not honoured." for name in _IGNORED if extra.get(name) not in _NEUTRAL)]
