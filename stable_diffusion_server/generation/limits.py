"""Limits of a request: bounds of every number and text, both ends included."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from stable_diffusion_server.errors import InvalidInput, number_text
from stable_diffusion_server.types import LORA_WEIGHT_MAX, SEED_MAX, GenerationRequest

# Maximum characters of a text and of a name, checked before any parsing; the settings allow no longer prompts.
TEXT_MAX, NAME_MAX = 32_000, 200
# Maximum digits of an integer in a text: Python's `int` refuses thousands, and is slow for hundreds.
_MOST_DIGITS = 18


def parse_int(text: str) -> int | None:
    """Parse a text of ASCII digits; `None` for any other text, and for more than 18 digits."""
    return int(text) if len(text) <= _MOST_DIGITS and text.isascii() and text.isdigit() else None


def range_sentence(name: str, low: float, high: float) -> str:
    """Return the sentence for a number out of its range."""
    return f"{name} must be between {number_text(low)} and {number_text(high)}."


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """Bounds of request parameters, from the settings. Sides in pixels, `timeout` in seconds; both ends included."""

    min_side: int = 64
    max_side: int = 2048
    max_steps: int = 150
    max_guidance: float = 30.0
    max_prompt_characters: int = TEXT_MAX
    max_timeout: float = 600.0
    max_feather: int = 256
    max_loras: int = 4
    max_references: int = 4

    def bounds(self) -> dict[str, tuple[float, float]]:
        """Return (smallest, largest) accepted value by name of numeric parameter."""
        return {
            "width": (self.min_side, self.max_side),
            "height": (self.min_side, self.max_side),
            "num_inference_steps": (1, self.max_steps),
            "guidance_scale": (0.0, self.max_guidance),
            "seed": (0, SEED_MAX),
            "quality": (1, 100),
            "timeout": (0.001, self.max_timeout),
            "strength": (0.0, 1.0),
            "feather": (0, self.max_feather),
            # On the scale of OpenCV's Canny: |dx| + |dy| of 8-bit samples by 3 × 3 Sobel, at most 1020 each.
            "canny_low": (0, 2040),
            "canny_high": (0, 2040),
            "control_scale": (0.0, 2.0),
            "hires_width": (self.min_side, self.max_side),
            "hires_height": (self.min_side, self.max_side),
            "hires_steps": (1, self.max_steps),
            "hires_strength": (0.0, 1.0),
        }

    def check(self, request: GenerationRequest) -> None:
        """Raise `InvalidInput` that names every parameter of the request that is out of its bounds."""
        if faults := self.faults(partial(getattr, request)):
            raise InvalidInput.from_faults(faults)

    def faults(self, value_of: Callable[[str], Any]) -> list[tuple[str, str]]:
        """Return (parameter, sentence) of each value out of its bounds; `value_of` returns a parameter by its name."""
        faults = []
        for name, (low, high) in self.bounds().items():
            value = value_of(name)
            # This form also refuses NaN, which compares false with everything.
            if isinstance(value, int | float) and not low <= value <= high:
                faults.append((name, range_sentence(name, low, high)))
        longest = self.max_prompt_characters
        faults += [
            (name, f"{name} must not be longer than {longest} characters.")
            for name in ("prompt", "negative_prompt")
            if len(value_of(name) or "") > longest
        ]
        references = value_of("references") or ()
        if len(references) > self.max_references:
            field = references[self.max_references].parameter
            faults.append((field, f"At most {self.max_references} reference images are taken, as MAX_REFERENCES says."))
        loras = value_of("loras")
        if len(loras) > self.max_loras:
            faults.append(("lora", f"lora must not name more than {self.max_loras}."))
        if not all(-LORA_WEIGHT_MAX <= weight <= LORA_WEIGHT_MAX for _, weight in loras):
            faults.append(("lora", range_sentence("lora weights", -LORA_WEIGHT_MAX, LORA_WEIGHT_MAX)))
        return faults
