"""What every peer does for an order, whatever stands around it: the stock pipeline, enlarging, a WebP file."""

from __future__ import annotations

import base64
import io
import os
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLInpaintPipeline, StableDiffusionXLPipeline
from PIL import Image

# As the server that is measured beside them has them.
STEPS, GUIDANCE, QUALITY, METHOD = 4, 2.0, 85, 2


def load(model: str, threads: int) -> Any:
    """The stock pipeline in fp32 on the CPU, in a process with so many threads for its tensors."""
    torch.set_num_threads(threads)
    pipeline = StableDiffusionXLPipeline.from_pretrained(model, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: Any, orders: list[dict[str, Any]]) -> list[Image.Image]:
    """The pictures of some orders, those of one canvas in one call of the pipeline."""
    drawn: dict[int, Image.Image] = {}
    sizes = {(order["canvas_width"], order["canvas_height"]) for order in orders}
    for width, height in sizes:
        numbers = [n for n, o in enumerate(orders) if (o["canvas_width"], o["canvas_height"]) == (width, height)]
        images = pipeline(
            [orders[n]["prompt"] for n in numbers],
            width=width,
            height=height,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            generator=[torch.Generator("cpu").manual_seed(orders[n]["seed"]) for n in numbers],
        ).images
        drawn.update(zip(numbers, images, strict=True))
    return [drawn[n] for n in range(len(orders))]


def redraw(pipeline: Any, order: dict[str, Any]) -> Image.Image:
    """Image to image, or inpainting where there is a mask, by the stock pipelines over the same weights."""
    size = (order["canvas_width"], order["canvas_height"])
    given = {name: _picture(order[name]).resize(size) for name in ("image", "mask") if name in order}
    kind = StableDiffusionXLInpaintPipeline if "mask" in given else StableDiffusionXLImg2ImgPipeline
    images = {"image": given["image"], **({"mask_image": given["mask"]} if "mask" in given else {})}
    if "mask" in given:
        images |= {"width": size[0], "height": size[1]}
    picture: Image.Image = kind.from_pipe(pipeline)(
        order["prompt"],
        **images,
        strength=0.6,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        generator=torch.Generator("cpu").manual_seed(order["seed"]),
    ).images[0]
    return picture


def _picture(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB")


def keep(picture: Image.Image, order: dict[str, Any]) -> dict[str, str]:
    """Enlarge a picture as the server does, store it, and tell where."""
    if picture.size != (order["width"], order["height"]):
        picture = picture.resize((order["width"], order["height"]), Image.Resampling.LANCZOS)
    path = Path(os.environ["PICTURES"]) / f"{order['name']}.webp"
    picture.save(path, quality=QUALITY, method=METHOD)
    return {"path": str(path)}
