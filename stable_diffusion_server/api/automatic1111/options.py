"""The options of AUTOMATIC1111's API: what each caller set, within bounds, and the routes that read and set them."""

from __future__ import annotations

import math
from collections.abc import Mapping

from cachetools import LRUCache
from fastapi import APIRouter, Request, Response
from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict  # pydantic rejects typing.TypedDict before Python 3.12

from stable_diffusion_server.api.automatic1111.checkpoint_names import model_named, title_of
from stable_diffusion_server.api.dependencies import DialectContext, caller_of
from stable_diffusion_server.api.http_responses import JSONResponse
from stable_diffusion_server.api.openapi.document import json_body
from stable_diffusion_server.api.request_parsing import read_json
from stable_diffusion_server.api.schemas.responses import described
from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.parsing import dumps
from stable_diffusion_server.types import Caller, Format

# Bounds of what one caller can store: 1000 callers hold at most 8 MB, and as many anonymous ones.
_MAX_CALLERS, _MAX_OPTIONS, _MAX_BYTES = 1000, 80, 8192
_NAME_CHARACTERS, _TEXT_CHARACTERS, _LIST_LENGTH = 100, 1000, 100
_MODEL, _HASH, _FORMAT = "sd_model_checkpoint", "sd_checkpoint_hash", "samples_format"
# File formats by their names in the option `samples_format`.
FORMATS = {"png": Format.PNG, "jpg": Format.JPEG, "jpeg": Format.JPEG, "webp": Format.WEBP}

# Options that change an image in AUTOMATIC1111 and have no effect here, with their neutral values.
_WITHOUT_EFFECT: Mapping[str, tuple[object, ...]] = {
    "CLIP_stop_at_last_layers": (1,),
    "sd_vae": ("Automatic", "None", ""),
    "eta_noise_seed_delta": (0,),
    "initial_noise_multiplier": (1,),
    "img2img_color_correction": (False,),
    "face_restoration": (False,),
    "inpainting_mask_weight": (1,),
    "sd_hypernetwork": ("None", ""),
    "sd_lora": ("None", ""),
}

Option = str | bool | int | float | list[str | bool | int | float]
_DEFAULTS: Automatic1111OptionsBody = {
    "sd_model_checkpoint": "",
    "sd_checkpoint_hash": "",
    "samples_format": "png",
    "CLIP_stop_at_last_layers": 1,
    "sd_vae": "Automatic",
    "sd_hypernetwork": "None",
    "sd_lora": "None",
    "eta_noise_seed_delta": 0,
    "initial_noise_multiplier": 1.0,
    "inpainting_mask_weight": 1.0,
    "img2img_color_correction": False,
    "face_restoration": False,
    "jpeg_quality": 80,
    "send_seed": True,
    "enable_pnginfo": True,
    "live_previews_enable": True,
    "return_grid": False,
    "do_not_show_images": False,
}


@with_config(ConfigDict(extra="allow"))
class Automatic1111OptionsBody(TypedDict):
    """Options of this server with AUTOMATIC1111's defaults, and further ones that the caller set."""

    sd_model_checkpoint: str
    sd_checkpoint_hash: str
    samples_format: str
    CLIP_stop_at_last_layers: int
    sd_vae: str
    sd_hypernetwork: str
    sd_lora: str
    eta_noise_seed_delta: int
    initial_noise_multiplier: float
    inpainting_mask_weight: float
    img2img_color_correction: bool
    face_restoration: bool
    jpeg_quality: int
    send_seed: bool
    enable_pnginfo: bool
    live_previews_enable: bool
    return_grid: bool
    do_not_show_images: bool


class CallerOptions:
    """The options that each caller set, by name. LRU caches bound the number of callers.

    API keys and anonymous callers have a cache each, because anonymous callers can come from any number of addresses.
    """

    def __init__(self) -> None:
        self._of_keys: LRUCache[str, dict[str, Option]] = LRUCache(_MAX_CALLERS)
        self._of_anonymous: LRUCache[str, dict[str, Option]] = LRUCache(_MAX_CALLERS)

    def of(self, caller: Caller) -> Mapping[str, Option]:
        """Return the options that a caller set; the model is a name in the catalogue."""
        return self._cache_of(caller).get(caller.owner, {})

    def update(self, caller: Caller, changes: Mapping[str, object], context: DialectContext) -> None:
        """Set options; `None` restores a default. Raises `InvalidInput` with all faults, and changes nothing then.

        Raises `Forbidden` for a model that the caller may not use.
        """
        changes = {name: value for name, value in changes.items() if name != _HASH}
        faults = [(name[:100], reason) for name, value in changes.items() if (reason := _fault_of(name, value))]
        if not faults and (name := str(changes.get(_MODEL) or "").strip()):
            changes[_MODEL] = model_named(name, context, _MODEL)
        elif not faults:
            changes.pop(_MODEL, None)  # as in AUTOMATIC1111, no name keeps the model
        merged = {
            name: value
            for name, value in {**self.of(caller), **changes}.items()
            if value is not None and value != _DEFAULTS.get(name)  # clients send back all that they read
        }
        if not faults and (len(merged) > _MAX_OPTIONS or len(dumps(merged).encode()) > _MAX_BYTES):
            most = f"At most {_MAX_OPTIONS} options of {_MAX_BYTES} bytes together are kept for a caller."
            faults = [(next(iter(changes))[:100], most)]
        if faults:
            raise InvalidInput.from_faults(faults)
        self._cache_of(caller)[caller.owner] = merged  # type: ignore[assignment]  # checked above

    def _cache_of(self, caller: Caller) -> LRUCache[str, dict[str, Option]]:
        return self._of_anonymous if " " in caller.owner else self._of_keys  # names of API keys contain no spaces


def image_options(options: Mapping[str, Option]) -> dict[str, Option]:
    """Return the options that apply to an image: the model, the file format, and set ones without effect here."""
    return {
        name: value
        for name, value in options.items()
        if name in (_MODEL, _FORMAT) or value not in _WITHOUT_EFFECT.get(name, (value,))
    }


def file_format_of(options: Mapping[str, Option]) -> Format:
    """Return the file format of a caller's images."""
    return FORMATS[str(options.get(_FORMAT, "png")).lower()]


def model_of(options: Mapping[str, Option]) -> str | None:
    """Return the name of the model that a caller chose, `None` without a choice."""
    return str(options.get(_MODEL) or "") or None


def options_body(context: DialectContext, options: Mapping[str, Option]) -> Automatic1111OptionsBody:
    """Return the options with the caller's own, and with the title of the model."""
    spec = context.model(model_of(options))
    facts = {"sd_model_checkpoint": title_of(spec), "sd_checkpoint_hash": spec.weights}
    return {**_DEFAULTS, **options, **facts}  # type: ignore[typeddict-item]  # the options may be further ones


def add_option_routes(routes: APIRouter, context: DialectContext, kept: CallerOptions) -> None:
    """Add the routes that read and set the caller's options."""

    @routes.get(
        "/sdapi/v1/options",
        summary="AUTOMATIC1111: your options",
        operation_id="sdapi_options",
        response_model=None,
        responses={200: {"model": described(Automatic1111OptionsBody)}},
    )
    async def options(request: Request) -> Response:
        """Return the options, with what this caller set."""
        caller = caller_of(request)
        return JSONResponse(options_body(context.for_caller(caller), kept.of(caller)))

    @routes.post(
        "/sdapi/v1/options",
        summary="AUTOMATIC1111: set your options",
        operation_id="sdapi_set_options",
        openapi_extra=json_body(
            {_MODEL: {"type": ["string", "null"]}, _FORMAT: {"type": ["string", "null"], "enum": [*FORMATS, None]}}
        ),
        response_model=None,
    )
    async def set_options(request: Request) -> Response:
        """Set options of this caller: the model and file format of its images; others are only answered back.

        A refused option changes nothing.
        """
        caller = caller_of(request)
        kept.update(caller, await read_json(request), context.for_caller(caller))
        return JSONResponse(None)


def _fault_of(name: str, value: object) -> str:
    """Return why an option is refused; empty if it is accepted."""
    shown = name[:_NAME_CHARACTERS]
    if not (name.isascii() and name.replace("-", "_").isidentifier() and len(name) <= _NAME_CHARACTERS):
        return f"{shown} is not the name of an option."
    if value is None:
        return ""
    if name == _MODEL:
        return "" if isinstance(value, str) else f"{name} must be a text."
    if name == _FORMAT:
        known = isinstance(value, str) and value.lower() in FORMATS
        return "" if known else f"{name} must be png, jpg or webp."
    parts = value if isinstance(value, list) else [value]
    if len(parts) > _LIST_LENGTH or not all(map(_is_scalar, parts)):
        return (
            f"{shown} must be a text of up to {_TEXT_CHARACTERS} characters, a number, a boolean, or a list of up to "
            f"{_LIST_LENGTH} of these."
        )
    return ""


def _is_scalar(value: object) -> bool:
    if isinstance(value, str):
        return len(value) <= _TEXT_CHARACTERS
    return isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value))
