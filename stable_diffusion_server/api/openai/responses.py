"""Responses of the OpenAI Images API: images by URL or in base64, models, events, errors in events."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import (
    Literal,
    NotRequired,  # pydantic rejects typing.TypedDict before Python 3.12
)

from typing_extensions import TypedDict

from stable_diffusion_server.api.base64_images import text_of
from stable_diffusion_server.api.dependencies import DialectContext
from stable_diffusion_server.api.http_responses import json_event
from stable_diffusion_server.api.openai.protocol import ImagesParams
from stable_diffusion_server.api.problems import openai_error
from stable_diffusion_server.api.schemas.responses import WarningBody, problem_body
from stable_diffusion_server.errors import ServerError
from stable_diffusion_server.imaging import media_type_of
from stable_diffusion_server.types import GenerationResult

_QUALITIES = {"hd": "high", "standard": "medium", None: "auto"}
# OpenAI bills by tokens. This server does not count tokens, but OpenAI's clients require the fields.
_USAGE: dict[str, object] = {
    "input_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
    "output_tokens": 0,
    "output_tokens_details": {"image_tokens": 0, "text_tokens": 0},
    "total_tokens": 0,
}


class OpenAIImageBody(TypedDict):
    """An image, by URL or in base64, with facts of this server's results."""

    key: str
    seed: int | None
    model: str | None
    cached: bool
    url: NotRequired[str]
    b64_json: NotRequired[str]
    revised_prompt: NotRequired[str]


class OpenAIImagesBody(TypedDict):
    """Images as OpenAI's clients read them."""

    created: int
    background: str
    output_format: str
    quality: str
    size: str
    usage: dict[str, object]
    data: list[OpenAIImageBody]
    warnings: list[WarningBody]


class OpenAIModelBody(TypedDict):
    """A model. `revision` identifies its weights; it is empty until a model on demand was loaded for the first time.

    `bytes` is the size of its weights in memory, or of its files while it is not loaded. `residency` says where its
    weights are: `resident`, `model`, `group` or `sequential` once it is loaded, `loading` with the per cent in
    `loading`, or `unloaded`: the next request loads it. A `pinned` model is not unloaded for others.
    """

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    revision: str
    family: str
    bytes: int
    residency: str
    loading: int | None
    pinned: bool


class OpenAIModelListBody(TypedDict):
    """All models, and their aliases."""

    object: Literal["list"]
    data: list[OpenAIModelBody]


@dataclass(frozen=True, slots=True)
class GeneratedImage:
    """A generated image: its result, its URL, and its file, which is empty unless the response holds it."""

    result: GenerationResult
    url: str
    file: bytes


def images_body(
    parameters: ImagesParams, images: Sequence[GeneratedImage], context: DialectContext
) -> OpenAIImagesBody:
    """Return the response with images, and with the warnings of this server."""
    first = images[0].result
    reported = dict.fromkeys(warning for image in images for warning in image.result.warnings)
    warnings = [*parameters.warnings(context), *reported]
    return {
        "created": int(time.time()),
        "background": "opaque",
        "output_format": _format_of(images[0]),
        "quality": _quality(parameters),
        "size": f"{first.width}x{first.height}",
        "usage": _USAGE,
        "data": [_image_body(parameters, image) for image in images],
        "warnings": [{"code": warning.code, "message": warning.message} for warning in warnings],
    }


def completed_event(parameters: ImagesParams, image: GeneratedImage, kind: str) -> bytes:
    """Return the final event of an image; `kind` is that of the route, such as `image_generation`."""
    result = image.result
    body = _event_body(parameters, image.file, _format_of(image), f"{result.width}x{result.height}")
    facts = {"url": image.url, "key": result.key, "seed": result.seed, "cached": result.cached}
    return _event(f"{kind}.completed", {**body, **facts, "usage": _USAGE})


def partial_event(parameters: ImagesParams, file: bytes, index: int, size: str, kind: str) -> bytes:
    """Return the event of a preview. The preview is small; `size` is that of the final image."""
    body = _event_body(parameters, file, _format(file), size)
    return _event(f"{kind}.partial_image", {**body, "partial_image_index": index})


def error_event(error: ServerError) -> bytes:
    """Return the last event of a stream that fails after its start."""
    return _event("error", {"error": openai_error(problem_body(error), error.kind)})


def models_body(context: DialectContext) -> OpenAIModelListBody:
    """Return the models and their aliases."""
    names = list(context.models)
    known = {name: context.models[name].name for name in names}
    further = [alias for alias, name in context.aliases.items() if name in known and alias not in known]
    return {"object": "list", "data": [model_body(name, context) for name in [*names, *further]]}


def model_body(name: str, context: DialectContext) -> OpenAIModelBody:
    """Return a model under one of its names. Raises `InvalidInput` for an unknown one."""
    spec = context.model(name)
    status = context.status_of(spec.name)
    return {
        "id": name,
        "object": "model",
        "created": 0,
        "owned_by": "stable-diffusion-server",
        "revision": "" if spec.unread else spec.revision,
        **status,  # type: ignore[typeddict-item]  # the app makes the other members
    }


def _event(kind: str, body: Mapping[str, object]) -> bytes:
    """Return an event as OpenAI sends it, with its type also in the data."""
    return json_event({"type": kind, **body}, kind)


def _image_body(parameters: ImagesParams, image: GeneratedImage) -> OpenAIImageBody:
    result = image.result
    body: OpenAIImageBody = {
        "key": result.key,
        "seed": result.seed,
        "model": result.model,
        "cached": result.cached,
    }
    if parameters.as_base64:
        body["b64_json"] = text_of(image.file)
    else:
        body["url"] = image.url
    if result.prompt_used:
        body["revised_prompt"] = result.prompt_used
    return body


def _event_body(parameters: ImagesParams, file: bytes, file_format: str, size: str) -> dict[str, object]:
    return {
        "b64_json": text_of(file),
        "created_at": int(time.time()),
        "size": size,
        "quality": _quality(parameters),
        "background": "opaque",
        "output_format": file_format,
    }


def _quality(parameters: ImagesParams) -> str:
    return _QUALITIES.get(parameters.quality, parameters.quality or "auto")


def _format_of(image: GeneratedImage) -> str:
    if image.file:
        return _format(image.file)
    ending = image.result.key.rsplit(".", 1)[-1].lower()
    return {"jpg": "jpeg"}.get(ending, ending if ending in ("png", "jpeg", "webp") else "webp")


def _format(file: bytes) -> str:
    return media_type_of(file).removeprefix("image/")
