"""Checks of requests for seamless images: which models draw them, and of which sizes."""

from __future__ import annotations

from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.imaging import plan_canvas
from stable_diffusion_server.pipelines import ModelSpec
from stable_diffusion_server.types import GenerationRequest, Tiling

# How many native areas a second pass may draw at once: the first pass has composed the image.
SECOND_PASS_AREAS = 4


def check_tiling(request: GenerationRequest, spec: ModelSpec) -> None:
    """Raise `InvalidInput` if a request for a seamless image cannot be drawn as one."""
    if request.extend is not None or request.only_masked is not None:
        raise InvalidInput("tiling is for whole images: nothing is extended or drawn in a part.", field="tiling")
    passes = ((request.width, request.height, 1), (request.hires_width, request.hires_height, SECOND_PASS_AREAS))
    for width, height, areas in passes:
        if request.tiling and (lack := tiling_lack(request.tiling, spec, width, height, areas)):
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
