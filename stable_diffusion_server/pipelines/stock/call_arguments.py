"""What a request becomes as arguments of a stock pipeline's call."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image

from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.pipelines.call_parameters import CallParameters
from stable_diffusion_server.pipelines.model_spec import ModelSpec
from stable_diffusion_server.types import DiffusionRequest, ImageArray, Task

# The ratio of sides that Qwen2-VL's processor takes.
_LONGEST = 200
# SanaSprint's second noise level is for two steps.
_SPRINT = "intermediate_timesteps"


def call_arguments(
    request: DiffusionRequest, spec: ModelSpec, parameters: CallParameters, *, latent: bool
) -> dict[str, Any]:
    """The arguments of the call that draws a request; with `latent` it returns latents, otherwise pixels.

    Raises `InvalidInput` for what the class does not take.
    """
    refused = [
        (field, f"{spec.name} is drawn by {parameters.class_name}, which takes no {what}.")
        for field, what, given in (
            ("lora", "LoRAs here", bool(request.loras)),
            ("refine", "second pass", request.refine),
            ("canny", "edges", request.control is not None),
            ("negative_prompt", "negative prompt", bool(request.negative_prompt) and not spec.takes_negative_prompt),
        )
        if given
    ]
    if refused:
        raise InvalidInput.from_faults(refused)
    given: dict[str, Any] = {
        "prompt": request.prompt,
        "negative_prompt": _negative_prompt(request, spec, parameters),
        "height": request.height,
        "width": request.width,
        "num_inference_steps": request.num_inference_steps,
        "max_sequence_length": spec.text_tokens,
        "generator": torch.Generator("cpu").manual_seed(request.seed),
        "output_type": "latent" if latent else "np",
        # Sizes are ours: the class is to draw the one that is asked for.
        "use_resolution_binning": False,
        "clean_caption": False,  # needs packages that are no dependencies, and changes prompts where they are there
        "_auto_resize": False,
        "max_area": request.width * request.height,
        **_pictures(request),
    }
    if spec.takes_guidance:
        given[parameters.guidance] = request.guidance_scale
    given |= parameters.checked_extra(request.extra, spec)
    known = {name: value for name, value in given.items() if name in parameters.names and value is not None}
    if _SPRINT in parameters.names and request.num_inference_steps != 2:
        known[_SPRINT] = None
    return known


def _negative_prompt(request: DiffusionRequest, spec: ModelSpec, parameters: CallParameters) -> str | None:
    """Without a negative prompt `true_cfg_scale` has no effect; the model cards of Qwen-Image give " "."""
    true_guidance = parameters.guidance == "true_cfg_scale" and request.guidance_scale > 1
    return request.negative_prompt or (" " if true_guidance and spec.takes_negative_prompt else None)


def _pictures(request: DiffusionRequest) -> dict[str, Any]:
    if request.task is Task.EDIT:
        references = [_reference(*numbered) for numbered in enumerate(request.references)]
        # JoyImageEditPlus calls them `images`; names that the class does not have are left out.
        return {"image": references if len(references) > 1 else references[0], "images": references}
    if request.image is None:
        return {}
    # A strength that leaves no step draws one, where that is wanted at all.
    given: dict[str, Any] = {"image": _as_pil(request.image)}
    given["strength"] = max(request.strength, 1 / request.num_inference_steps)
    return given if request.mask is None else {**given, "mask_image": _as_pil(request.mask)}


def _reference(number: int, image: ImageArray) -> Image.Image:
    """Raises `InvalidInput` for one that Qwen2-VL's processor refuses, which no class here takes."""
    height, width = image.pixels.shape[:2]
    if max(height, width) > _LONGEST * min(height, width):
        sentence = f"The longer side of a reference image is at most {_LONGEST} times the shorter; one has "
        raise InvalidInput(f"{sentence}{width} × {height}.", field=f"references[{number}]")
    return _as_pil(image)


def _as_pil(image: ImageArray) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(image.pixels))
