"""Provenance metadata: in the image file, in the object's record, and in the history."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from datetime import UTC, datetime

from stable_diffusion_server import __version__
from stable_diffusion_server.generation.control_units import recorded_units, shown_controls
from stable_diffusion_server.generation.layout import ImageLayout
from stable_diffusion_server.generation.limits import changed_fields
from stable_diffusion_server.generation.quality import CheckedImage, DecodedPixels
from stable_diffusion_server.generation.resolver import ResolvedRequest
from stable_diffusion_server.generation.second_pass import second_pass_parameters
from stable_diffusion_server.imaging import DigitalSourceType
from stable_diffusion_server.storage import IMMUTABLE, HistoryEntry
from stable_diffusion_server.types import (
    DiffusionRequest,
    GenerationRequest,
    MaskMode,
    PromptSyntax,
    Task,
    diffusion_request_fields,
)

# Request fields that a replay does not need: input images, where and when the result is stored, how prompts came about.
NOT_RECORDED = frozenset(
    "image mask references image_prompts save_path named_by_content folder overwrite timeout alone "
    "webhook_url named_for styles wildcards expanded".split()
)
# Generation warnings that are recorded with the object, so that later cache hits repeat them.
RECORDED_WARNINGS = {
    "prompt-shortened": "The prompt was shortened; the picture says to what.",
    "not-used": "Part of the request was not used as it was asked for; the picture's metadata say which.",
    "redecoded": "The decoder overflowed and ran again in full precision.",
    "tiled": "The device was short of memory; the picture was made in tiles, which differs faintly.",
    "redrawn-not-finite": "The numbers were not finite; it was drawn with another seed.",
    "redrawn-black": "The picture was black; it was drawn once more with another seed.",
    "redrawn-bumpy": "The picture was too bumpy; it was drawn again, the best is kept.",
    "black": "The picture is black.",
    "bumpy": "The picture has much black, much white and uneven greys.",
}


@dataclass(frozen=True, slots=True)
class Authorship:
    """What the Content Credentials of an image say: the software that made it, from which files, by which prompt.

    `revision` is the digest of the software. `source_type` is `None` if only input images decide whether the image is
    AI-generated.
    """

    software: str
    revision: str
    digest: str
    source_type: DigitalSourceType | None
    inputs: tuple[Ingredient, ...] = ()
    prompt: str = ""


@dataclass(frozen=True, slots=True)
class Ingredient:
    """An input file of an image; `parent`: the image is an edited version of it."""

    name: str
    file: bytes
    parent: bool


def ingredients_of(request: GenerationRequest, fetched: Mapping[str, bytes]) -> tuple[Ingredient, ...]:
    """Return the input images of a request, without masks, the edited one first; `fetched` are downloaded ones."""
    edited = request.image or (request.references[0] if request.task is Task.EDIT and request.references else None)
    masks = [request.mask, *(unit.mask for unit in request.controls)]
    found = [source for source in request.sources if not any(source is mask for mask in masks)]
    found.sort(key=lambda source: source is not edited)
    files = ((source, source.data or fetched.get(source.parameter, b"")) for source in found)
    return tuple(Ingredient(source.parameter, file, source is edited) for source, file in files)


def credentials_manifest(made: Authorship, *, with_prompt: bool) -> dict[str, object]:
    """Return the manifest to sign (C2PA 2.2): how the image was made, with the software's name and digest.

    It names the ingredients; those that the image is no version of are inputs of the last action.
    """
    ingredients = [
        {"title": part.name, "relationship": "parentOf" if part.parent else "inputTo", "label": f"input{number}"}
        for number, part in enumerate(made.inputs)
    ]
    opened, others = (
        [part["label"] for part in ingredients if part["relationship"] == kind] for kind in ("parentOf", "inputTo")
    )
    action: dict[str, object] = {
        "action": "c2pa.edited" if opened else "c2pa.created",
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "softwareAgent": {"name": made.software, "version": made.revision},
        "parameters": {
            "digest": made.digest,
            **({"prompt": made.prompt} if with_prompt and made.prompt else {}),
            **({"ingredientIds": others} if others else {}),
        },
    }
    if made.source_type is not None:
        action["digitalSourceType"] = made.source_type.uri
    first = [{"action": "c2pa.opened", "parameters": {"ingredientIds": opened}}] if opened else []
    return {
        "claim_generator_info": [{"name": "Stable Diffusion Server", "version": __version__}],
        "ingredients": ingredients,
        "assertions": [{"label": "c2pa.actions.v2", "data": {"actions": [*first, action]}}],
    }


def build_record(
    resolved: ResolvedRequest, layout: ImageLayout, image: CheckedImage[DecodedPixels], codes: Iterable[str], size: int
) -> dict[str, str]:
    """Return the object's record: short and ASCII, since S3 allows 2 KB. `size` is the file's, in bytes."""
    request = image.request
    warned = ",".join(code for code in dict.fromkeys(codes) if code in RECORDED_WARNINGS)
    return {
        "digest": resolved.content_digest,
        "order": resolved.request_digest,
        "sent": resolved.sent_digest,
        "task": request.task,
        "model": request.model,
        "revision": request.revision,
        "seed": str(request.seed),
        "width": str(layout.width),
        "height": str(layout.height),
        "steps": str(request.num_inference_steps),
        "guidance": repr(float(request.guidance_scale)),
        "scheduler": request.scheduler,
        "file": resolved.file,
        "bytes": str(size),
        "batched": "1" if image.batched else "0",
        **({"warned": warned} if warned else {}),
        **({IMMUTABLE: "1"} if resolved.request.save_path is None else {}),
    }


def embedded_metadata(
    resolved: ResolvedRequest, layout: ImageLayout, image: CheckedImage[DecodedPixels]
) -> dict[str, object]:
    """Return the metadata to embed in the file, as JSON types: how it was generated, and the request for a replay.

    `asked` is the request; `sources` the SHA-256 of its input files; `transparency`: the mask is an alpha channel.
    """
    return {
        **diffusion_request_fields(image.request),
        "width": layout.width,
        "height": layout.height,
        "digest": resolved.content_digest,
        "batched": image.batched,
        **({"warnings": [*image.product.warnings]} if image.product.warnings else {}),
        **_hires_fields(resolved, layout),
        **_control_fields(resolved, image.request),
        "asked": requested_fields(resolved),
        "sources": {name: digest for name, digest in resolved.source_digests.items() if digest is not None},
        **({"transparency": True} if resolved.request.mask is not None and resolved.request.mask.transparency else {}),
    }


def _control_fields(resolved: ResolvedRequest, drawn: DiffusionRequest) -> dict[str, object]:
    controls = resolved.parameters.controls
    return {"controls": shown_controls(controls, drawn.controls)} if controls and drawn.controls else {}


def _hires_fields(resolved: ResolvedRequest, layout: ImageLayout) -> dict[str, object]:
    """Return the sizes of both passes and the parameters of the second one; nothing without a second pass.

    `layout` is that of the second pass. What the second pass has of its own is there only where it was given.
    """
    request, plan = resolved.request, resolved.second
    if plan is None:
        return {}
    steps, strength = second_pass_parameters(resolved)
    size, scale = (layout.width, layout.height), request.hires_scale
    before = [request.width, request.height] if scale is None else [round(side / scale) for side in size]
    fields: dict[str, object] = {"from": before, "to": [*size], "steps": steps, "strength": strength}
    fields |= {} if plan.upscaler is None else {"upscaler": plan.upscaler.name}
    if plan.own is not None:
        (asked, parameters), sampling = plan.own, dict(plan.own[1].sampling)
        own = {
            "scheduler": (request.hires_scheduler, parameters.scheduler),
            "schedule": (request.hires_schedule, sampling.get("schedule", "automatic")),
            "guidance_scale": (request.hires_guidance, parameters.guidance_scale),
            "prompt": (request.hires_prompt, parameters.prompt),
            "negative_prompt": (request.hires_negative_prompt, parameters.negative_prompt or ""),
            "loras": (request.hires_loras, [[*pair] for pair in asked.loras]),
        }
        fields |= {name: value for name, (given, value) in own.items() if given is not None}
    return {"hires": fields}


def requested_fields(resolved: ResolvedRequest) -> dict[str, object]:
    """Return the request as JSON types, with all defaults and the seed, without its input images."""
    request, parameters = resolved.request, resolved.parameters
    resolved_fields = {
        "prompt": parameters.prompt,
        "model": parameters.spec.name,
        "negative_prompt": parameters.negative_prompt,
        "seed": resolved.seed,
        "variation": 0,
        "num_inference_steps": parameters.num_inference_steps,
        "guidance_scale": parameters.guidance_scale,
        "scheduler": parameters.scheduler,
        "strength": parameters.strength,
        "canny": parameters.canny,
        "control_scale": parameters.control_scale,
        "format": resolved.file_format,
        "quality": resolved.quality,
        "prompt_syntax": parameters.prompt_syntax,
        "clip_skip": parameters.clip_skip,
        "sampling": parameters.sampling,
        "prompt_2": parameters.prompt_2,
    }
    requested = {part.name: getattr(request, part.name) for part in fields(request) if part.name not in NOT_RECORDED}
    values = {name: resolved_fields.get(name, value) for name, value in requested.items()}
    if parameters.controls:
        values["controls"] = recorded_units(parameters.controls)
    if request.repairs:
        values["repairs"] = [changed_fields(repair) for repair in request.repairs]
    # As files of older versions are read.
    absent = "clip_skip prompt_2 extend tiling upscaler scale".split()
    absent += "hires_upscaler hires_scheduler hires_schedule hires_prompt hires_negative_prompt".split()
    absent += "hires_scale hires_guidance hires_loras".split()
    usual = {**dict.fromkeys(absent), "prompt_syntax": PromptSyntax.PLAIN}
    usual |= {"mask_mode": MaskMode.HARD, "extra": (), "sampling": (), "lora_parts": (), "repairs": ()}
    usual["controls"] = ()
    return {name: value for name, value in values.items() if name not in usual or value != usual[name]}


def history_entry(
    key: str, caller: str, resolved: ResolvedRequest, request: DiffusionRequest, metadata: dict[str, object]
) -> HistoryEntry:
    """Return the history entry of an image that was just stored."""
    return HistoryEntry(
        key=key,
        digest=resolved.content_digest,
        prompt=resolved.parameters.prompt,
        model=request.model,
        task=request.task,
        seed=request.seed,
        width=int(str(metadata["width"])),
        height=int(str(metadata["height"])),
        caller=caller,
        drawn_at=time.time(),
        record=metadata,
    )
