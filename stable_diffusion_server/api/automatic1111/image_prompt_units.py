"""Maps units of AUTOMATIC1111's ControlNet extension whose detector or model is an IP-Adapter to image prompts."""

from __future__ import annotations

from collections.abc import Sequence

from stable_diffusion_server.api.automatic1111.controlnet_names import base_name
from stable_diffusion_server.api.automatic1111.controlnet_units import SentUnit
from stable_diffusion_server.api.automatic1111.task_params import Img2Img, Txt2Img
from stable_diffusion_server.api.base64_images import bytes_of
from stable_diffusion_server.api.dependencies import DialectContext
from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.pipelines import ModelSpec
from stable_diffusion_server.types import ControlMode, ImageInput, ImagePrompt

FIELD = "alwayson_scripts"
# The extension's detector that finds an adapter's encoder; here every adapter has its own.
ADAPTER_MODULE = "ip-adapter-auto"
_BEGINNINGS = ("ip-adapter", "ip_adapter", "ipadapter")
_FACES = "face_id", "faceid", "pulid", "insight"
_HEAVIEST = 2


def take_image_prompts(
    units: Sequence[SentUnit], params: Txt2Img, spec: ModelSpec, context: DialectContext
) -> tuple[tuple[ImagePrompt, ...], list[SentUnit], list[str]]:
    """Return the image prompts among the units, the other units, and sentences about those that are left out.

    Reads folders; blocks. Raises `InvalidInput` for a unit without an image.
    """
    prompts: list[ImagePrompt] = []
    others: list[SentUnit] = []
    ignored = []
    for unit in units:
        if not _is_adapter(unit):
            others.append(unit)
            continue
        name, lack = _chosen(unit, context.image_prompts.usable(spec), spec)
        if lack:
            ignored.append(f"controlnet: a unit of {unit.words} is left out: {lack}")
            continue
        if unit.model != "none" and base_name(unit.model) != base_name(name):
            ignored.append(f"controlnet: {unit.model[:50]} is not here; {name} is taken.")
        odd = (("mask", bool(unit.mask)), ("control_mode", unit.mode is not ControlMode.BALANCED))
        ignored += [f"controlnet: {field} is not honoured for {name}." for field, is_odd in odd if is_odd]
        data = bytes_of(_image(unit, params), FIELD)
        image = ImageInput(f"image_prompts[{len(prompts)}].image", data=data)
        prompts.append(ImagePrompt(image, name, unit.weight, unit.start, unit.end))
    return tuple(prompts), others, ignored


def adapter_names(context: DialectContext) -> list[str]:
    """Return the names of the adapters for all models. Reads folders; blocks."""
    return [*dict.fromkeys(name for spec in context.models.values() for name in context.image_prompts.usable(spec))]


def _is_adapter(unit: SentUnit) -> bool:
    return unit.module.startswith(_BEGINNINGS) or (
        unit.module == "none" and base_name(unit.model).rpartition("/")[2].startswith(_BEGINNINGS)
    )


def _chosen(unit: SentUnit, usable: Sequence[str], spec: ModelSpec) -> tuple[str, str]:
    """Return the adapter that reads a unit, and why none does, as the end of a sentence."""
    if any(word in f"{unit.module} {unit.model}" for word in _FACES):
        return "", "adapters of FaceID are not read."
    if not usable:
        return "", f"{spec.name} has nothing here that reads image prompts."
    if not 0 <= unit.start < unit.end <= 1:
        return "", "it ends before it starts."
    if not 0 <= unit.weight <= _HEAVIEST:
        return "", f"its weight is not within 0 and {_HEAVIEST}."
    wanted = base_name(unit.model)
    named = (name for name in usable if base_name(name) in (wanted, wanted.rpartition("/")[2]))
    return next(named, usable[0]), ""


def _image(unit: SentUnit, params: Txt2Img) -> str:
    """Return the image of a unit in base64, by default the input image."""
    if unit.image:
        return unit.image
    first = params.init_images[0] if isinstance(params, Img2Img) and params.init_images else ""
    if not first:
        raise InvalidInput("A unit of an IP-Adapter needs its image here.", field=FIELD)
    return first
