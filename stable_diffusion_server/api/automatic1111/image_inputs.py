"""Input images of AUTOMATIC1111's tasks: masks, edges, outpainting scripts; and `tiling`.

What cannot be drawn so becomes a sentence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from stable_diffusion_server.api.automatic1111.controlnet_mapping import CannyUnit
from stable_diffusion_server.api.automatic1111.controlnet_units import SOFT_INPAINTING
from stable_diffusion_server.api.automatic1111.task_params import Img2Img, Txt2Img
from stable_diffusion_server.api.base64_images import bytes_of
from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.generation import check_tiling
from stable_diffusion_server.pipelines import ModelSpec
from stable_diffusion_server.types import Extension, Fill, Fit, GenerationRequest, ImageInput, MaskMode, Task, Tiling

_FITS = (Fit.STRETCH, Fit.CROP, Fit.PAD, Fit.STRETCH)
_FILL_OF_MASK = (Fill.SURROUNDINGS, Fill.ORIGINAL, Fill.NOISE, Fill.GREY)
# Scripts by name: the positions of pixels, mask blur, directions and fill among their arguments.
_SCRIPTS: dict[str, tuple[int, int, int, int | None]] = {
    "outpainting mk2": (1, 2, 3, None),
    "poor man's outpainting": (0, 1, 3, 2),
}
_SIDES = {"left": "left", "right": "right", "up": "top", "down": "bottom"}
_FILLS = {
    name: fill
    for names, fill in zip(
        (("fill", 0), ("original", 1), ("latent noise", 2), ("latent nothing", 3)),
        _FILL_OF_MASK,
        strict=True,
    )
    for name in names
}
_FIELD = "script_args"
# Defaults of Soft Inpainting's arguments after the first.
_SOFT_USUAL = (1, 0.5, 4, 0, 0.5, 2)
_SOFT_TOLD = "Soft Inpainting: its arguments are not honoured; grey says how much is changed."


def with_images(
    generation: GenerationRequest, params: Txt2Img, edges: CannyUnit | None, most: int, spec: ModelSpec
) -> tuple[list[GenerationRequest], int, list[str]]:
    """Return a request for each image, the images in a batch, and sentences about ignored parameters."""
    if edges is not None:
        generation = replace(
            generation, canny=True, canny_low=edges.low, canny_high=edges.high, control_scale=edges.weight
        )
    batch, images = params.batch_size or 1, [generation]
    ignored: list[str] = []
    if isinstance(params, Img2Img):
        inputs = params.init_images or []
        batch = len(inputs) if len(inputs) > 1 else batch
    count = batch * (params.n_iter or 1)
    if count > most:
        raise InvalidInput(f"batch_size × n_iter must not be more than {most}.", field="batch_size")
    if isinstance(params, Img2Img):
        images, ignored = _with_input_images(generation, params, edges)
    elif edges is not None:
        if not edges.image:
            raise InvalidInput("A ControlNet unit needs its image here.", field="alwayson_scripts")
        # Only the image's edges are used, so its pixels do not constrain the result (strength 1).
        image = ImageInput("alwayson_scripts", data=bytes_of(edges.image, "alwayson_scripts"))
        images = [replace(generation, task=Task.IMAGE_TO_IMAGE, image=image, strength=1.0)]
    images, about_tiling = _with_tiling(images, params, spec)
    images = [replace(images[number % len(images)], variation=number) for number in range(count)]
    return images, batch, [*ignored, *about_tiling]


def _with_input_images(
    generation: GenerationRequest, params: Img2Img, edges: CannyUnit | None
) -> tuple[list[GenerationRequest], list[str]]:
    """Return a request for each input image, and sentences about ignored parameters."""
    if not params.init_images:
        raise InvalidInput("init_images must hold a picture in base64.", field="init_images")
    files = [bytes_of(image, "init_images") for image in params.init_images]
    ignored = []
    if params.enable_hr:
        ignored.append("enable_hr has no effect in img2img.")
    if edges is not None and edges.image and [bytes_of(edges.image, "alwayson_scripts")] != files:
        ignored.append("controlnet: the edges are taken from init_images.")
    generation = replace(
        generation,
        task=Task.IMAGE_TO_IMAGE,
        fit=_FITS[params.resize_mode or 0],
        strength=0.75 if params.denoising_strength is None else params.denoising_strength,
    )
    soft, about_soft = _soft_mask(params)
    if params.mask:
        if edges is not None:
            ignored.append("controlnet: edges are not followed where a mask is.")
        whole = params.inpaint_full_res is not None and not params.inpaint_full_res
        generation = replace(
            generation,
            task=Task.INPAINT,
            canny=False,
            mask=ImageInput("mask", data=bytes_of(params.mask, "mask"), inverted=params.inpainting_mask_invert == 1),
            feather=4 if params.mask_blur is None else params.mask_blur,
            fill=_FILL_OF_MASK[params.inpainting_fill or 0],
            only_masked=None if whole else params.inpaint_full_res_padding or 0,
            mask_mode=MaskMode.SOFT if soft else MaskMode.HARD,
        )
        ignored += about_soft
    generation, about_script = _with_script(generation, params)
    images = [replace(generation, image=ImageInput("init_images", data=file)) for file in files]
    return images, [*ignored, *about_script]


def _with_tiling(
    generations: Sequence[GenerationRequest], params: Txt2Img, spec: ModelSpec
) -> tuple[list[GenerationRequest], list[str]]:
    """Return the requests for seamless images if they are asked for, or as they are with a sentence on the reason."""
    if not params.tiling:
        return [*generations], []
    tiled = [replace(generation, tiling=Tiling.BOTH) for generation in generations]
    try:
        check_tiling(tiled[0], spec)
    except InvalidInput as error:
        return [*generations], [error.detail]
    return tiled, []


def _with_script(generation: GenerationRequest, params: Img2Img) -> tuple[GenerationRequest, list[str]]:
    """Return the request as an outpainting script extends its image, and a sentence about any other script.

    As those scripts, it takes the image's own size in place of `width` and `height`. Raises `InvalidInput` for
    arguments that are none.
    """
    if not params.script_name:
        return generation, []
    places = _SCRIPTS.get(params.script_name.strip().lower())
    if places is None:
        return generation, ["script_name is not honoured."]
    args = params.script_args if isinstance(params.script_args, list) else []
    pixels, blur, directions, fill = (
        args[place] if place is not None and place < len(args) else None for place in places
    )
    sides = dict.fromkeys(_sides(directions), _whole(pixels, 128))
    return replace(
        generation,
        task=Task.INPAINT,
        canny=False,
        width=None,
        height=None,
        only_masked=None,
        fill=Fill.NOISE if places[3] is None else _fill(fill),
        extend=Extension(**sides, overlap=_whole(blur, 8)),
    ), []


def _soft_mask(params: Img2Img) -> tuple[bool, list[str]]:
    """Return whether "Soft Inpainting" is enabled, and a sentence if its further arguments are not its defaults."""
    for name, script in (params.alwayson_scripts or {}).items():
        args = script.get("args") if isinstance(script, dict) else None
        if name.lower() == SOFT_INPAINTING and isinstance(args, list) and args[:1] == [True]:
            odd = any(given not in (usual, None) for given, usual in zip(args[1:], _SOFT_USUAL, strict=False))
            return True, [_SOFT_TOLD] if odd else []
    return False, []


def _sides(directions: Any) -> list[str]:
    """The sides of directions, a text or a list; by default all of them."""
    names = [*_SIDES] if directions is None else [directions] if isinstance(directions, str) else directions
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name in _SIDES for name in names):
        raise InvalidInput(f"{_FIELD} must name the directions left, right, up or down.", field=_FIELD)
    return [_SIDES[name] for name in names]


def _whole(value: Any, default: int) -> int:
    """A whole number of pixels; the limits of a request bound it further."""
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1_000_000:
        raise InvalidInput(f"{_FIELD} must have numbers of pixels.", field=_FIELD)
    return int(value)


def _fill(value: Any) -> Fill:
    if not isinstance(value, str | int | None) or (value is not None and value not in _FILLS):
        raise InvalidInput(f"{_FIELD} must have a known fill.", field=_FIELD)
    return Fill.SURROUNDINGS if value is None else _FILLS[value]
