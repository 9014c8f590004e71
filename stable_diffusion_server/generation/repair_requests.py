"""The requests that draw parts of a finished image again, and how detectors are named."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import numpy as np

from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.generation.limits import range_sentence
from stable_diffusion_server.imaging import ALIGNMENT, Pixels
from stable_diffusion_server.pipelines import ModelSpec
from stable_diffusion_server.types import DetailRepair, Fill, GenerationRequest, ImageInput, MaskMode, Task

MOST_REPAIRS, MOST_PART_PROMPTS = 4, 16
# Least and largest values by name of a repair's field; sides and steps are bounded as those of any request.
REPAIR_BOUNDS: dict[str, tuple[float, float]] = {
    "confidence": (0.0, 1.0),
    "most": (1, 16),
    "least_area": (0.0, 1.0),
    "most_area": (0.0, 1.0),
    "strength": (0.0, 1.0),
    "padding": (0, 512),
    "feather": (0, 256),
    "dilation": (-128, 128),
}
_MASK = "repairs"


@dataclass(frozen=True, slots=True)
class ChosenDetector:
    """A detector that a request names; `identity` says which file it is, in digests."""

    name: str
    identity: str


@dataclass(frozen=True, slots=True)
class DetectedPart:
    """A part of an image: its box in pixels (left, top, right, bottom) and its score, 0..1."""

    box: tuple[float, float, float, float]
    score: float
    label: str = ""


class DetailDetector(Protocol):
    """Finds parts of images by the detector files of this server."""

    def names(self) -> Sequence[str]:
        """Return the names of the detectors that can be used. Reads a folder."""

    def find(self, name: str, field: str) -> ChosenDetector:
        """Return the detector of a name. Blocks. Raises `InvalidInput` for `field`."""

    async def detect(self, name: str, pixels: Pixels, field: str, *, share: str = ...) -> Sequence[DetectedPart]:
        """Return the parts of an image (uint8, height × width × 3), in any order; `share` is the caller's.

        Raises `InvalidInput` for `field` if the detector's file cannot be used.
        """


class NoDetector:
    """A server without detectors."""

    def names(self) -> Sequence[str]:
        """Return none."""
        return ()

    def find(self, name: str, field: str) -> ChosenDetector:
        """Raise `InvalidInput`."""
        raise InvalidInput(f"{name[:100]!r} is not a detector here; this server has none.", field=field)

    async def detect(self, name: str, pixels: Pixels, field: str, *, share: str = "") -> Sequence[DetectedPart]:
        """Return nothing."""
        return ()


def repair_identity(repairs: Sequence[DetailRepair], detector: DetailDetector) -> list[str]:
    """Return which files find the parts. Raises `InvalidInput` for an unknown detector."""
    return [
        detector.find(repair.detector, f"repairs[{number}].detector").identity for number, repair in enumerate(repairs)
    ]


def part_request(request: GenerationRequest, repair: DetailRepair, number: int, spec: ModelSpec) -> GenerationRequest:
    """Return the request that draws part `number` again, with the image and mask still to be laid out."""
    side = math.isqrt(spec.native_pixels) // ALIGNMENT * ALIGNMENT
    one_pass: dict[str, Any] = {part.name: part.default for part in fields(request) if part.name.startswith("hires_")}
    return replace(
        request,
        task=Task.INPAINT,
        prompt=_text_of(repair.prompts, number) or request.prompt,
        negative_prompt=_text_of(repair.negative_prompts, number) or request.negative_prompt,
        image=ImageInput("image", data=b""),
        mask=ImageInput(_MASK, data=b""),
        references=(),
        controls=(),
        image_prompts=(),
        canny=False,
        width=repair.width or side,
        height=repair.height or side,
        num_inference_steps=repair.steps or request.num_inference_steps,
        strength=repair.strength,
        at_least_one_step=True,
        only_masked=repair.padding,
        feather=repair.feather,
        fill=Fill.ORIGINAL,
        mask_mode=MaskMode.HARD,
        extend=None,
        tiling=None,
        refine=False,
        repairs=(),
        **one_pass,
    )


def check_repairs(request: GenerationRequest, spec: ModelSpec, check: Callable[[GenerationRequest], None]) -> None:
    """Raise `InvalidInput` for values out of their bounds, for a model that does not inpaint, and for refused parts.

    `check` raises it for a request that draws a part.
    """
    faults = []
    if len(request.repairs) > MOST_REPAIRS:
        faults.append(("repairs", f"repairs has more than {MOST_REPAIRS} entries."))
    for number, repair in enumerate(request.repairs[:MOST_REPAIRS]):
        place = f"repairs[{number}]"
        for name, (low, high) in REPAIR_BOUNDS.items():
            if not low <= getattr(repair, name) <= high:  # this form also refuses NaN
                faults.append((f"{place}.{name}", range_sentence(f"{place}.{name}", low, high)))
        if repair.least_area > repair.most_area:
            faults.append((f"{place}.least_area", f"{place}.least_area must not be above most_area."))
        if max(len(repair.prompts), len(repair.negative_prompts)) > MOST_PART_PROMPTS:
            faults.append((f"{place}.prompt", f"{place}.prompt has more than {MOST_PART_PROMPTS} texts."))
    if Task.INPAINT not in spec.tasks:
        faults.append(("repairs", f"{spec.name} does not inpaint, so it cannot draw parts again."))
    if faults:
        raise InvalidInput.from_faults(faults)
    for entry, repair in enumerate(request.repairs):
        for number in range(max(1, len(repair.prompts), len(repair.negative_prompts))):
            try:
                check(part_request(request, repair, number, spec))
            except InvalidInput as error:
                faults = [(f"repairs[{entry}].{name}", sentence) for name, sentence in error.faults]
                raise InvalidInput.from_faults(faults) from error


def chosen_parts(parts: Sequence[DetectedPart], repair: DetailRepair, width: int, height: int) -> list[DetectedPart]:
    """Return the parts that are drawn again in an image of `width` × `height` pixels, the surest first."""
    inside = []
    for part in parts:
        if part.score < repair.confidence or not all(map(math.isfinite, part.box)):
            continue
        left, top = max(0.0, part.box[0]), max(0.0, part.box[1])
        right, bottom = min(float(width), part.box[2]), min(float(height), part.box[3])
        share = max(0.0, right - left) * max(0.0, bottom - top) / (width * height)
        if share > 0 and repair.least_area <= share <= repair.most_area:
            inside.append(replace(part, box=(left, top, right, bottom)))
    # Ties are broken by place, so that equal detections give equal images.
    return sorted(inside, key=lambda part: (-part.score, part.box))[: repair.most]


def part_mask(part: DetectedPart, repair: DetailRepair, width: int, height: int) -> Pixels:
    """Return the mask of a part (uint8, height × width × 3), white where it is drawn again; at least one pixel."""
    grown = repair.dilation
    left, right = _grown(part.box[0], part.box[2], grown, width)
    top, bottom = _grown(part.box[1], part.box[3], grown, height)
    mask = np.zeros((height, width, 3), np.uint8)
    mask[top:bottom, left:right] = 255
    return mask


def _grown(low: float, high: float, by: int, most: int) -> tuple[int, int]:
    """Return a range of whole pixels that is `by` larger at both ends, within 0..`most`, of one pixel at least."""
    start, end = math.floor(low) - by, math.ceil(high) + by
    if end <= start:
        start = end = (start + end) // 2
    start = min(max(0, start), most - 1)
    return start, max(start + 1, min(most, end))


def _text_of(texts: Sequence[str], number: int) -> str:
    return texts[min(number, len(texts) - 1)].strip() if texts else ""
