"""Bounds of request parameters, and the names and file formats that images are stored under."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from secrets import randbelow
from typing import Any
from uuid import NAMESPACE_OID, uuid5

from stable_diffusion_server.errors import InvalidInput, number_text
from stable_diffusion_server.parsing import read_lora_parts
from stable_diffusion_server.pipelines import SAMPLING_NUMBERS
from stable_diffusion_server.types import (
    LORA_WEIGHT_MAX,
    NOISE_SEEDS,
    SEED_MAX,
    ControlUnit,
    DetailRepair,
    Extension,
    Fill,
    Fit,
    Format,
    GenerationRequest,
    ImagePrompt,
    MaskMode,
)

# Maximum characters of a text and of a name, checked before any parsing; the settings allow no longer prompts.
TEXT_MAX, NAME_MAX = 32_000, 200
_EXTENSIONS = {"webp": Format.WEBP, "png": Format.PNG, "jpg": Format.JPEG, "jpeg": Format.JPEG}
# Extensions of image files that this server does not produce.
_OTHER_IMAGE_EXTENSIONS = frozenset("gif svg bmp tif tiff avif heic heif jxl ico pdf psd jp2 ppm tga".split())
# What a second pass has of its own, beside its size, steps and strength.
HIRES_OWN = tuple(
    "hires_scheduler hires_schedule hires_guidance hires_prompt hires_negative_prompt hires_loras".split()
)
_HIRES_RARE = ("hires_upscaler", "hires_scale", *HIRES_OWN)
HIRES_FIELDS = ("hires_width", "hires_height", "hires_steps", "hires_strength", *_HIRES_RARE)
_PARTS = ("controls", "repairs")
# Maximum digits of an integer in a text: Python's `int` refuses thousands, and is slow for hundreds.
_MOST_DIGITS = 20


def _parts_fault(text: str) -> str:
    """Return why a LoRA's weights by parts are none; empty if they are."""
    try:
        parts = read_lora_parts(text)
    except ValueError as error:
        return f"lora: {error}"
    weights = (*parts.blocks, *(() if parts.encoders is None else (parts.encoders,)))
    within = all(-LORA_WEIGHT_MAX <= weight <= LORA_WEIGHT_MAX for weight in weights)
    return "" if within else range_sentence("lora weights by parts", -LORA_WEIGHT_MAX, LORA_WEIGHT_MAX)


def _unit_faults(unit: ControlUnit | ImagePrompt, name: str) -> list[tuple[str, str]]:
    """Return (parameter, sentence) of each number of a unit or an image prompt out of its bounds."""
    bounds = {"weight": (0, 2), "start": (0, 1), "end": (0, 1), "resolution": (64, 2048)}
    values = {part: value for part in bounds if (value := getattr(unit, part, None)) is not None}
    faults = [
        (f"{name}.{part}", range_sentence(f"{name}.{part}", *bounds[part]))
        for part, value in values.items()
        if not bounds[part][0] <= value <= bounds[part][1]
    ]
    if any(isinstance(value, bool | str) or not math.isfinite(value) for _, value in getattr(unit, "options", ())):
        faults.append((f"{name}.options", f"{name}.options must be numbers."))
    return faults or ([] if unit.start < unit.end else [(f"{name}.end", f"{name}.end must be above start.")])


def parse_int(text: str) -> int | None:
    """Parse a text of ASCII digits; `None` for any other text, and for more than 20 digits."""
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
    max_controls: int = 4
    max_image_prompts: int = 4
    max_upscaled_side: int = 8192
    max_upscaled_pixels: int = 33_554_432
    max_scale: float = 16.0

    def for_upscaling(self) -> RequestLimits:
        """Return the bounds of requests that enlarge an image: their sizes have limits of their own."""
        return replace(self, min_side=1, max_side=self.max_upscaled_side)

    def check_upscaled(self, width: int, height: int, field: str) -> None:
        """Raise `InvalidInput` for `field` if an enlarged image of this size (pixels) would be too large."""
        if max(width, height) > self.max_upscaled_side or width * height > self.max_upscaled_pixels:
            raise InvalidInput(
                f"The result would have {width} × {height} pixels; a side may have {self.max_upscaled_side}, "
                f"and the whole {self.max_upscaled_pixels}.",
                field=field,
            )

    def bounds(self) -> dict[str, tuple[float, float]]:
        """Return (smallest, largest) accepted value by name of numeric parameter."""
        return {
            "width": (self.min_side, self.max_side),
            "height": (self.min_side, self.max_side),
            "num_inference_steps": (1, self.max_steps),
            "guidance_scale": (0.0, self.max_guidance),
            "seed": (0, SEED_MAX),
            "clip_skip": (0, 11),
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
            "hires_scale": (1.0, self.max_scale),
            "hires_guidance": (0.0, self.max_guidance),
            **dict.fromkeys(("extend_left", "extend_right", "extend_top", "extend_bottom"), (0, self.max_side)),
            "extend_overlap": (0, self.max_feather),
            "scale": (1.0, self.max_scale),
            **{name: (option.low, option.high) for name, option in SAMPLING_NUMBERS.items()},
        }

    def check(self, request: GenerationRequest) -> None:
        """Raise `InvalidInput` that names every parameter of the request that is out of its bounds."""
        if faults := self.faults(partial(getattr, request)):
            raise InvalidInput.from_faults(faults)

    def faults(self, value_of: Callable[[str], Any]) -> list[tuple[str, str]]:
        """Return (parameter, sentence) of each value out of its bounds; `value_of` returns a parameter by its name."""
        faults = []
        parts = {**dict(value_of("sampling") or ()), **extension_fields(value_of("extend"))}
        for name, (low, high) in self.bounds().items():
            value = parts.get(name) if name in SAMPLING_NUMBERS or name.startswith("extend_") else value_of(name)
            # This form also refuses NaN, which compares false with everything.
            if isinstance(value, int | float) and not low <= value <= high:
                faults.append((name, range_sentence(name, low, high)))
        extension = value_of("extend")
        if extension is not None and not extension.has_sides:
            faults.append(("extend_overlap", "extend_overlap needs a side that is extended."))
        longest = self.max_prompt_characters
        faults += [
            (name, f"{name} must not be longer than {longest} characters.")
            for name in ("prompt", "negative_prompt", "prompt_2", "hires_prompt", "hires_negative_prompt")
            if len(value_of(name) or "") > longest
        ]
        references = value_of("references") or ()
        if len(references) > self.max_references:
            field = references[self.max_references].parameter
            faults.append((field, f"At most {self.max_references} reference images are taken, as MAX_REFERENCES says."))
        controls = value_of("controls") or ()
        if len(controls) > self.max_controls:
            sentence = f"At most {self.max_controls} control images are taken, as MAX_CONTROLS says."
            faults.append((f"controls[{self.max_controls}]", sentence))
        faults += [fault for number, unit in enumerate(controls) for fault in _unit_faults(unit, f"controls[{number}]")]
        prompts = value_of("image_prompts") or ()
        if len(prompts) > self.max_image_prompts:
            sentence = f"At most {self.max_image_prompts} image prompts are taken, as MAX_IMAGE_PROMPTS says."
            faults.append((f"image_prompts[{self.max_image_prompts}]", sentence))
        faults += [
            fault for number, one in enumerate(prompts) for fault in _unit_faults(one, f"image_prompts[{number}]")
        ]
        hires_loras = value_of("hires_loras") or ()
        if len(hires_loras) > self.max_loras:
            faults.append(("hires_loras", f"hires_loras must not name more than {self.max_loras}."))
        if not all(-LORA_WEIGHT_MAX <= weight <= LORA_WEIGHT_MAX for _, weight in hires_loras):
            faults.append(("hires_loras", range_sentence("hires_loras weights", -LORA_WEIGHT_MAX, LORA_WEIGHT_MAX)))
        loras = value_of("loras")
        if len(loras) > self.max_loras:
            faults.append(("lora", f"lora must not name more than {self.max_loras}."))
        if not all(-LORA_WEIGHT_MAX <= weight <= LORA_WEIGHT_MAX for _, weight in loras):
            faults.append(("lora", range_sentence("lora weights", -LORA_WEIGHT_MAX, LORA_WEIGHT_MAX)))
        names = [name for name, _ in loras]
        for name, text in value_of("lora_parts") or ():
            fault = f"lora {name} has weights by parts, so it is named once." if names.count(name) > 1 else ""
            faults += [("lora", fault)] if (fault := fault or _parts_fault(text)) else []
        return faults


def asks_for_second_pass(request: GenerationRequest) -> bool:
    """Return whether a request has any parameter of a second pass."""
    return any(getattr(request, name) is not None for name in HIRES_FIELDS)


def has_second_pass(request: GenerationRequest) -> bool:
    """Return whether a request has a second pass, of a size or by a scale."""
    return request.hires_scale is not None or (request.hires_width is not None and request.hires_height is not None)


def second_size(request: GenerationRequest, width: int, height: int) -> tuple[int, int]:
    """Return width and height of the second pass over an image of this size, all in pixels."""
    if request.hires_scale is None:
        return request.hires_width or width, request.hires_height or height
    return int(width * request.hires_scale), int(height * request.hires_scale)


def name_of(request: GenerationRequest, request_digest: str) -> str:
    """Return `save_path`; with `named_by_content`, the file name gets a prefix of 8 digits of a UUIDv5."""
    name = request.save_path or ""
    if not request.named_by_content or not name:
        return name
    folder, slash, file = name.rpartition("/")
    return f"{folder}{slash}{str(uuid5(NAMESPACE_OID, request_digest))[:8]}-{file}" if file else name


def file_format_of(request: GenerationRequest) -> Format:
    """Return the requested format, or that of the extension of `save_path`, or WebP. Raises `InvalidInput`."""
    name = (request.save_path or "").rsplit("/", 1)[-1]
    ending = name.rsplit(".", 1)[1].lower() if "." in name else ""
    if ending in _OTHER_IMAGE_EXTENSIONS:
        raise InvalidInput(f"save_path ends in .{ending}; there are .webp, .png and .jpg.", field="save_path")
    promised = _EXTENSIONS.get(ending)
    if request.format and promised and request.format is not promised:
        raise InvalidInput(f"format is {request.format}, and save_path ends in .{ending}.", field="format")
    return request.format or promised or Format.WEBP


def seed_of(request: GenerationRequest, request_digest: str) -> int:
    """Return the requested seed, a random one, or one derived from the digest (equal requests, equal images)."""
    if request.seed == "random":
        return randbelow(NOISE_SEEDS)  # exact in every JSON reader
    return int(request_digest[:8], 16) if request.seed is None else (request.seed + request.variation) % (SEED_MAX + 1)


def image_options_identity(request: GenerationRequest) -> dict[str, object]:
    """Return the options that identify the picture; none at its default, so that older digests are valid."""
    resized = request.image is not None and request.width is not None
    hires = (request.hires_width, request.hires_height, request.hires_steps, request.hires_strength)
    second = {name: getattr(request, name) for name in _HIRES_RARE if getattr(request, name) is not None}
    parts = {name: getattr(request, name) for name in _PARTS if getattr(request, name)}
    return {
        **second,
        **{name: [changed_fields(part) for part in found] for name, found in parts.items()},
        **({"fit": request.fit} if resized and request.fit != Fit.CROP else {}),
        **({"hires": hires} if any(part is not None for part in hires) else {}),
        **({"fill": request.fill} if request.fill is not Fill.ORIGINAL else {}),
        **({"only_masked": request.only_masked} if request.only_masked is not None else {}),
        **({"mask_mode": request.mask_mode} if request.mask_mode is not MaskMode.HARD else {}),
        **({"extend": request.extend} if request.extend is not None else {}),
        **({"tiling": request.tiling} if request.tiling is not None else {}),
        **({"by": "transparency"} if request.mask is not None and request.mask.transparency else {}),
        **({"mask_inverted": True} if request.mask is not None and request.mask.inverted else {}),
    }


def changed_fields(part: ControlUnit | ImagePrompt | DetailRepair) -> dict[str, object]:
    """Return the options of a part that are not at their defaults; images are identified beside them."""
    values = {field.name: getattr(part, field.name) for field in fields(part) if field.name not in ("image", "mask")}
    return {
        field.name: values[field.name]
        for field in fields(part)
        if values.get(field.name, field.default) != field.default
    }


def extension_of(values: Mapping[str, int]) -> Extension | None:
    """Return the extension that parameters such as `extend_left` ask for; `None` if all of them are 0."""
    extension = Extension(**{name.removeprefix("extend_"): value for name, value in values.items()})
    return extension if any(extension) else None


def extension_fields(extension: Extension | None) -> dict[str, int]:
    """Return an extension by the names of its parameters."""
    return {} if extension is None else {f"extend_{name}": value for name, value in extension._asdict().items()}


def check_second_size(request: GenerationRequest, width: int, height: int, max_side: int) -> None:
    """Raise `InvalidInput` if the image of the second pass over one of this size (pixels) has sides too large."""
    if has_second_pass(request) and max(sides := second_size(request, width, height)) > max_side:
        sentence = f"The second pass has {sides[0]} × {sides[1]} pixels; a side must not have more than {max_side}."
        raise InvalidInput(sentence, field="hires_scale")


def check_extended_size(extension: Extension, width: int, height: int, max_side: int) -> None:
    """Raise `InvalidInput` if an image of `width` × `height` pixels becomes larger than `max_side` by its new sides."""
    sides = (("left", "right", width), ("top", "bottom", height))
    given = extension._asdict()
    faults = []
    for one, other, side in sides:
        if given[one] + given[other] and side + given[one] + given[other] > max_side:
            sentence = f"The image has {side} pixels on this side; extended it must not have more than {max_side}."
            faults += [(f"extend_{name}", sentence) for name in (one, other) if given[name]]
    if faults:
        raise InvalidInput.from_faults(faults)
