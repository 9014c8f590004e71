"""Image functions, under the path that the first version of this server had: re-exports `imaging`."""

from __future__ import annotations

from stable_diffusion_server.imaging import (
    ALIGNMENT,
    Canvas,
    canny,
    crop_to_size,
    encode_image,
    feather_mask,
    paste_back,
    plan_canvas,
    to_canvas,
    to_mask,
)

__all__ = [
    "ALIGNMENT",
    "Canvas",
    "canny",
    "crop_to_size",
    "encode_image",
    "feather_mask",
    "paste_back",
    "plan_canvas",
    "to_canvas",
    "to_mask",
]
