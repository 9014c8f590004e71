"""The metadata of generated images in AUTOMATIC1111's form: `info` of a response, with the infotext of each image."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stable_diffusion_server import __version__
from stable_diffusion_server.api.automatic1111.prompt_expansion import texts_of
from stable_diffusion_server.api.automatic1111.protocol import ParsedTask
from stable_diffusion_server.generation import image_seed
from stable_diffusion_server.imaging import SAMPLER_NAMES, parameters_text, parse_parameters, read_record
from stable_diffusion_server.pipelines import ModelSpec
from stable_diffusion_server.types import SEED_MAX, GenerationRequest, GenerationResult

_PLAIN_NAMES = {
    *("Prompt", "Negative prompt", "Steps", "Sampler", "Schedule type", "CFG scale", "Seed", "Size-1", "Size-2"),
    *("Model hash", "Model", "Denoising strength"),
}


@dataclass(frozen=True, slots=True)
class TaskImage:
    """A generated image of a task. An unfinished one has no `result` and no `url`; `steps_done` says how far it is.

    `replayed`: an earlier request with its idempotency key generated it.
    """

    generation: GenerationRequest
    result: GenerationResult | None
    url: str
    file: bytes
    steps_done: str = ""
    replayed: bool = False

    @property
    def seed(self) -> int:
        """The seed that was used."""
        if self.result is not None and self.result.seed is not None:
            return self.result.seed
        seed = self.generation.seed if isinstance(self.generation.seed, int) else 0
        return (seed + self.generation.variation) % (SEED_MAX + 1)


def generation_info(
    parsed: ParsedTask, images: Sequence[TaskImage], began: float, *, interrupted: bool
) -> dict[str, Any]:
    """Return the members of AUTOMATIC1111's `Processed.js()`, and further ones of this server.

    `began` is the time of the request, in seconds since 1970. All seeds are those that were used, so a request with
    them gives the same images.
    """
    generation, params, spec = parsed.generations[0], parsed.params, parsed.spec
    first = images[0] if images else None
    results = [image.result for image in images if image.result is not None]
    facts = _facts(generation, results[0] if results else None, spec)
    texts = [_infotext(image, spec) for image in images]
    infotext = parse_parameters(texts[0]) if texts else {}
    seeds = [image.seed for image in images]
    seed = seeds[0] if seeds else TaskImage(generation, None, "", b"").seed
    subseed = _subseed(parsed, seed)
    prompts, negatives = zip(*(_prompts(parsed, image) for image in images), strict=True) if images else ((), ())
    hires = facts.get("hires")
    width, height = hires["from"] if hires else (facts["width"], facts["height"])
    return {
        "prompt": prompts[0] if prompts else params.prompt,
        "all_prompts": [*prompts],
        "negative_prompt": negatives[0] if negatives else params.negative_prompt or "",
        "all_negative_prompts": [*negatives],
        "seed": seed,
        "all_seeds": seeds,
        "subseed": subseed,
        "all_subseeds": [subseed + number for number in range(len(images))],
        "subseed_strength": params.subseed_strength or 0,
        "width": width,
        "height": height,
        "sampler_name": SAMPLER_NAMES.get(str(facts["scheduler"]), facts["scheduler"]),
        "cfg_scale": facts["guidance_scale"],
        "steps": facts["num_inference_steps"],
        "batch_size": parsed.batch_size,
        "restore_faces": False,
        "face_restoration_model": None,
        "sd_model_name": facts["model"],
        "sd_model_hash": infotext.get("Model hash", spec.revision),
        "sd_vae_name": None,
        "sd_vae_hash": None,
        "seed_resize_from_w": -1,
        "seed_resize_from_h": -1,
        "denoising_strength": generation.hires_strength if hires else generation.strength,
        "extra_generation_params": {name: value for name, value in infotext.items() if name not in _PLAIN_NAMES},
        "index_of_first_image": 0,
        "infotexts": texts,
        "styles": params.styles or [],
        "job_timestamp": time.strftime("%Y%m%d%H%M%S", time.gmtime(began)),
        "clip_skip": 1 if generation.clip_skip is None else generation.clip_skip + spec.usual_clip_skip,
        "is_using_inpainting_conditioning": False,
        "version": f"stable-diffusion-server {__version__}",
        "paths": [image.url for image in images if image.result is not None],
        "keys": [result.key for result in results],
        "cached": [result.cached for result in results],
        "interrupted": interrupted,
        "not_honoured": parsed.ignored,
        "warnings": _warnings(images) if first else [],
    }


def _prompts(parsed: ParsedTask, image: TaskImage) -> tuple[str, str]:
    """Return prompt and negative prompt of an image; as they were sent, if another seed has expanded them."""
    generation, seed = image.generation, image.generation.seed
    other = image.replayed and isinstance(seed, int) and image_seed(generation, seed) != image.seed
    texts = {**texts_of(parsed.params), **({} if other else parsed.expanded.get(generation.variation, {}))}
    return texts["prompt"], texts["negative_prompt"]


def _subseed(parsed: ParsedTask, seed: int) -> int:
    """Return the subseed of the first image that is drawn, or else the one that was sent."""
    sent = parsed.params.subseed
    return int(dict(parsed.generations[0].sampling).get("subseed", seed if sent is None or sent < 0 else sent))


def _warnings(images: Sequence[TaskImage]) -> list[str]:
    """Return the warnings of all images, each once, and a sentence for each unfinished image."""
    warnings = [warning.message for image in images if image.result for warning in image.result.warnings]
    warnings += [f"The picture is unfinished: {image.steps_done}." for image in images if image.steps_done]
    return list(dict.fromkeys(warnings))


def _infotext(image: TaskImage, spec: ModelSpec) -> str:
    """Return the parameters text that is in the file; if there is none, the same from the request and the result."""
    record = read_record(image.file)
    if record is None or "prompt" not in record:
        return parameters_text({**_facts(image.generation, image.result, spec), "seed": image.seed})
    return parameters_text(record)


def _facts(generation: GenerationRequest, result: GenerationResult | None, spec: ModelSpec) -> Mapping[str, Any]:
    """Return the fields of a record that the parameters text shows."""
    hires = {
        "from": [generation.width, generation.height],
        "to": [generation.hires_width, generation.hires_height],
        "steps": generation.hires_steps,
        "strength": generation.hires_strength,
        "upscaler": generation.hires_upscaler,
        "scheduler": generation.hires_scheduler,
        "schedule": generation.hires_schedule,
        "guidance_scale": generation.hires_guidance,
        "prompt": generation.hires_prompt,
        "negative_prompt": generation.hires_negative_prompt,
        "loras": generation.hires_loras,
    }
    asked = {
        "num_inference_steps": _or(generation.num_inference_steps, spec.default_steps),
        "guidance_scale": _or(generation.guidance_scale, spec.default_guidance),
        "scheduler": generation.scheduler or spec.default_scheduler,
        "width": generation.width,
        "height": generation.height,
        "model": spec.name,
    }
    used = {name: value for name in asked if (value := getattr(result, name, None)) is not None}
    facts = {
        "prompt": (result.prompt_used if result is not None else None) or generation.prompt,
        "negative_prompt": generation.negative_prompt,
        "revision": spec.revision_for(edges=bool(generation.canny)),
        "loras": generation.loras,
        "lora_parts": generation.lora_parts,
        "image": generation.image and generation.image.parameter,
        "strength": generation.strength,
        **asked,
        **used,
    }
    if generation.hires_width is not None:
        facts["hires"] = {**hires, "steps": _or(generation.hires_steps, facts["num_inference_steps"])}
    return facts


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value
