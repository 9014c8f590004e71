"""What the FLUX.1 models take beside a prompt: true guidance, Fill's mask, Kontext's reference."""

from __future__ import annotations

import torch
from diffusers.pipelines.flux import pipeline_flux_kontext

from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.imaging import resize_image
from stable_diffusion_server.pipelines.model_spec import TRUE_GUIDANCE
from stable_diffusion_server.types import DiffusionRequest, ImageArray


def true_guidance(request: DiffusionRequest) -> float | None:
    """The scale of classifier-free guidance with the negative prompt; `None` for a request without it.

    Models that are distilled with their guidance take this beside it, at the price of a second row.
    """
    scale = float(dict(request.extra).get(TRUE_GUIDANCE, 1))
    return scale if scale > 1 and request.negative_prompt is not None else None


def image_and_mask(request: DiffusionRequest) -> tuple[ImageArray, ImageArray]:
    """The image and the mask of a request for Fill. Raises `InvalidInput` without one of them."""
    if request.image is None or request.mask is None:
        field = "image" if request.image is None else "mask"
        raise InvalidInput(f"{request.model} repaints what a mask covers, and there is no {field}.", field=field)
    return request.image, request.mask


def pixels_as_channels(mask: torch.Tensor, side: int) -> torch.Tensor:
    """A mask (1 × 1 × height × width) with each square of `side` pixels as channels of one: 1 × side² × h × w."""
    height, width = mask.shape[2] // side, mask.shape[3] // side
    squares = mask[:, 0].view(1, height, side, width, side)
    return squares.permute(0, 2, 4, 1, 3).reshape(1, side * side, height, width)


def as_reference(image: ImageArray) -> ImageArray:
    """A reference at that of the sizes Kontext was trained on whose aspect ratio is the nearest, about 1024²."""
    height, width = image.pixels.shape[:2]
    sizes = pipeline_flux_kontext.PREFERRED_KONTEXT_RESOLUTIONS
    _, width, height = min((abs(width / height - wide / high), wide, high) for wide, high in sizes)
    return ImageArray(resize_image(image.pixels, width, height))
