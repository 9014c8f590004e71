"""Options of a request's images: what of them identifies the picture, and checks of extension and tiling."""

from __future__ import annotations

from collections.abc import Mapping

from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.imaging import plan_canvas
from stable_diffusion_server.pipelines import ModelSpec
from stable_diffusion_server.types import Extension, Fill, GenerationRequest, MaskMode, Tiling

# How many native areas a second pass may draw at once: the first pass has composed the image.
SECOND_PASS_AREAS = 4


def image_options_identity(request: GenerationRequest) -> dict[str, object]:
    """Return the options that identify the picture; none at its default, so that older digests are valid."""
    return {
        **({"fill": request.fill} if request.fill is not Fill.ORIGINAL else {}),
        **({"only_masked": request.only_masked} if request.only_masked is not None else {}),
        **({"mask_mode": request.mask_mode} if request.mask_mode is not MaskMode.HARD else {}),
        **({"extend": request.extend} if request.extend is not None else {}),
        **({"tiling": request.tiling} if request.tiling is not None else {}),
    }


def extension_of(values: Mapping[str, int]) -> Extension | None:
    """Return the extension that parameters such as `extend_left` ask for; `None` if all of them are 0."""
    extension = Extension(**{name.removeprefix("extend_"): value for name, value in values.items()})
    return extension if any(extension) else None


def extension_fields(extension: Extension | None) -> dict[str, int]:
    """Return an extension by the names of its parameters."""
    return {} if extension is None else {f"extend_{name}": value for name, value in extension._asdict().items()}


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


def check_tiling(request: GenerationRequest, spec: ModelSpec) -> None:
    """Raise `InvalidInput` if a request for a seamless image cannot be drawn as one."""
    if request.tiling is None:
        return
    if request.extend is not None or request.only_masked is not None:
        raise InvalidInput("tiling is for whole images: nothing is extended or drawn in a part.", field="tiling")
    passes = ((request.width, request.height, 1), (request.hires_width, request.hires_height, SECOND_PASS_AREAS))
    for width, height, areas in passes:
        if lack := tiling_lack(request.tiling, spec, width, height, areas):
            raise InvalidInput(f"tiling: {lack}", field="tiling")


def tiling_lack(tiling: Tiling, spec: ModelSpec, width: int | None, height: int | None, areas: int = 1) -> str:
    """Return a sentence if the model draws no seamless image, or none of this size; otherwise an empty text.

    An image that is cut out of a larger one, or drawn at another size, would not meet itself. `areas` is how many
    native areas may be drawn.
    """
    if spec.denoiser_part != "unet" or spec.any_extra:
        return f"{spec.name} draws no seamless images; models with a UNet do (SD 1.5, SDXL)."
    if width is None or height is None:
        return ""
    canvas = plan_canvas(width, height, spec.native_pixels * areas, spec.min_side)
    cut = (tiling.wraps_x and canvas.width != width) or (tiling.wraps_y and canvas.height != height)
    if not cut and not canvas.resampled:
        return ""
    return (
        f"{spec.name} draws {width} × {height} as {canvas.width} × {canvas.height}; a seamless image has sides of at "
        f"least {spec.min_side} that are multiples of 64, and at most {spec.native_pixels * areas} pixels."
    )


def check_mask_mode(request: GenerationRequest, spec: ModelSpec) -> None:
    """Raise `InvalidInput` if a soft mask is asked for without a mask, or from a model that has no such steps."""
    if request.mask_mode is MaskMode.HARD:
        return
    if request.mask is None and request.extend is None:
        raise InvalidInput("mask_mode is for requests with a mask.", field="mask_mode")
    if spec.any_extra:
        raise InvalidInput(f"{spec.name} is drawn by its diffusers class, which has no soft masks.", field="mask_mode")
