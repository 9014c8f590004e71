"""Turns the values of form fields into API requests; the server checks their bounds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from stable_diffusion_server.ui.client import Fields, UiRequest

CREATE, RESTYLE = "/create_and_upload_image", "/style_transfer_bytes_and_upload_image"
INPAINT, EDIT = "/inpaint_and_upload_image", "/edit_and_upload_image"
UPSCALE = "/upscale_and_upload_image"
# Upscalers of every server, and those of latents, which only a second pass takes.
UPSCALERS = ("Lanczos", "embedded-2x", "Nearest")
LATENT_UPSCALERS = (
    *("latent", "latent-antialiased", "latent-bicubic", "latent-bicubic-antialiased"),
    *("latent-nearest", "latent-nearest-exact"),
)

SEED_END = 2**32
MOST_AT_ONCE = 8
# The largest MAX_REFERENCES that a server can have.
MOST_REFERENCES = 16
# Control units that a tab has fields for.
MOST_UNITS = 2
# Prompt suffixes for which the original server's page generated images at one click.
EXPLORED = ("", "awesome", "amazing", "detailed aesthetic", "wonderful", "anime hd")


class FormError(ValueError):
    """An invalid field, found before any request is sent: the field, and a sentence."""

    def __init__(self, field: str, sentence: str) -> None:
        super().__init__(sentence)
        self.field = field


@dataclass(frozen=True, slots=True)
class CommonFields:
    """Fields that every tab has; an empty text means the server's default. `more` are those of some tabs."""

    prompt: str
    negative: str = ""
    model: str = ""
    steps: str = ""
    guidance: str = ""
    seed: str = ""
    count: int = 1
    more: Fields = field(default_factory=dict)

    def fields(self) -> dict[str, str | list[str]]:
        """Return the request fields that are the same for each image of a click."""
        given = {
            "prompt": self.prompt,
            "negative_prompt": self.negative,
            "model": self.model,
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance,
        }
        return {**{name: value for name, value in given.items() if value or name == "prompt"}, **self.more}


@dataclass(frozen=True, slots=True)
class UnitFields:
    """Fields of a control unit; empty texts mean the server's default, and no image the request's own."""

    kind: str
    model: str = ""
    preprocess: str = ""
    weight: float = 1.0
    start: float = 0.0
    end: float = 1.0
    image: bytes | None = None


def guided(requests: list[UiRequest], units: Sequence[UnitFields], *, has_image: bool) -> list[UiRequest]:
    """Add control units to requests; `has_image`: these have an input image. Raises `FormError` without any image."""
    if not units:
        return requests
    if not has_image and any(unit.image is None for unit in units):
        raise FormError("controls", "Choose the picture of each control image that is used.")
    files = tuple(unit.image for unit in units if unit.image is not None)
    listed, place = [], 0
    for unit in units:
        given: dict[str, object] = {"kind": unit.kind, "weight": unit.weight, "start": unit.start, "end": unit.end}
        given |= {name: text for name, text in (("model", unit.model), ("preprocess", unit.preprocess)) if text}
        if unit.image is not None:
            given, place = {**given, "image_file": place}, place + 1
        listed.append(given)
    return [
        replace(request, fields={**request.fields, "controls": json.dumps(listed)}, controls=files)
        for request in requests
    ]


def create(
    common: CommonFields, width: float | None, height: float | None, *, explore: bool = False
) -> list[UiRequest]:
    """Text to image: `count` images with increasing seeds, or the six of `explore` with one seed."""
    fields = {**common.fields(), "width": number(width), "height": number(height)}
    if not explore:
        return several(common, UiRequest(CREATE, fields))
    one = replace(common, count=1)
    return [
        request
        for suffix in EXPLORED
        for request in several(
            one,
            UiRequest(
                CREATE, {**fields, "prompt": f"{common.prompt} {suffix}".rstrip()}, name=suffix or "as it was written"
            ),
        )
    ]


def restyle(
    common: CommonFields, image: bytes, strength: float, *, canny: bool, low: float = 100, high: float = 200
) -> list[UiRequest]:
    """Image to image, guided by the image's edges if `canny`."""
    fields = {**common.fields(), "strength": number(strength), "canny": str(canny).lower()}
    if canny:
        fields |= {"canny_low": number(low), "canny_high": number(high)}
    return several(common, UiRequest(RESTYLE, fields, {"image_file": image}))


def inpaint(
    common: CommonFields, image: bytes, mask: bytes | None, strength: float, feather: float, *, refine: bool
) -> list[UiRequest]:
    """Inpainting: generate the masked part of an image, or with `extend_…` in `common.more` what is beyond it."""
    fields = {
        **common.fields(),
        "strength": number(strength),
        "feather": number(feather),
        "refine": str(refine).lower(),
    }
    files = {"image_file": image} if mask is None else {"image_file": image, "mask_file": mask}
    return several(common, UiRequest(INPAINT, fields, files))


def edit(common: CommonFields, references: tuple[bytes, ...], width: str, height: str) -> list[UiRequest]:
    """Edit by instruction: references are in the order that the prompt counts; empty sides are the first one's."""
    size = {name: side for name, side in (("width", width), ("height", height)) if side}
    return several(common, UiRequest(EDIT, {**common.fields(), **size}, references=references))


def upscale(image: bytes, upscaler: str, scale: float | None) -> UiRequest:
    """Enlarge an image by a factor, without a prompt."""
    fields = {"upscaler": upscaler, "scale": number(scale)}
    return UiRequest(UPSCALE, {name: value for name, value in fields.items() if value}, {"image_file": image})


def several(common: CommonFields, request: UiRequest) -> list[UiRequest]:
    """Return `count` copies of a request with consecutive seeds from the given one."""
    if common.seed.isascii() and common.seed.isdigit():
        seeds = [str(int(common.seed) + further) for further in range(common.count)]
    else:
        seeds = [common.seed or "random"] * common.count
    return [replace(request, fields={**request.fields, "seed": seed}) for seed in seeds]


def number(value: float | None) -> str:
    """Format a number for a form field: whole ones without a decimal point, None as an empty text."""
    return "" if value is None else f"{value:g}" if value != int(value) else str(int(value))
