"""What the OpenAI Images API answers: pictures by address or in base64, models, events, errors in events."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from stable_diffusion_server.api.base64_images import text_of
from stable_diffusion_server.api.error_bodies import openai_error
from stable_diffusion_server.api.openai.protocol import ImagesParams
from stable_diffusion_server.errors import ServerError
from stable_diffusion_server.imaging import media_type_of
from stable_diffusion_server.parsing import dumps
from stable_diffusion_server.pipelines import ModelSpec
from stable_diffusion_server.types import GenerationResult

_QUALITIES = {"hd": "high", "standard": "medium", None: "auto"}
# The tokens OpenAI counts and bills: there are none here, and its clients want the fields.
_USAGE = {
    "input_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
    "output_tokens": 0,
    "output_tokens_details": {"image_tokens": 0, "text_tokens": 0},
    "total_tokens": 0,
}


@dataclass(frozen=True, slots=True)
class GeneratedImage:
    """A picture that was asked for: its receipt, its address, and its file where the answer holds it."""

    receipt: GenerationResult
    url: str
    file: bytes


def answer(parameters: ImagesParams, made: Sequence[GeneratedImage]) -> dict[str, object]:
    """The answer to a request for pictures, with what our receipts say beside what OpenAI's answers hold."""
    first = made[0].receipt
    told = {warning.code: warning for one in made for warning in one.receipt.warnings}
    warnings = [*parameters.warnings(), *told.values()]
    return {
        "created": int(time.time()),
        "background": "opaque",
        "output_format": _format_of(made[0]),
        "quality": _quality(parameters),
        "size": f"{first.width}x{first.height}",
        "usage": _USAGE,
        "data": [_datum(parameters, one) for one in made],
        "warnings": [{"code": warning.code, "message": warning.message} for warning in warnings],
    }


def completed(parameters: ImagesParams, made: GeneratedImage, kind: str) -> str:
    """The event that ends a picture; `kind` is that of the door, as in `image_generation`."""
    receipt = made.receipt
    size = f"{receipt.width}x{receipt.height}"
    body = _event_body(parameters, made.file, _format_of(made), size)
    facts = {"url": made.url, "key": receipt.key, "seed": receipt.seed, "cached": receipt.cached}
    return event(f"{kind}.completed", {**body, **facts, "usage": _USAGE})


def partial(parameters: ImagesParams, file: bytes, index: int, size: str, kind: str) -> str:
    """The event of a picture on its way: a small one, of which `size` tells the final one's."""
    body = _event_body(parameters, file, _format(file), size)
    return event(f"{kind}.partial_image", {**body, "partial_image_index": index})


def failed(error: ServerError) -> str:
    """The event that ends a stream that failed once it had begun."""
    body = {"detail": error.detail, "status": error.status, "field": error.field}
    return event("error", {"error": openai_error(body, error.kind)})


def event(kind: str, body: Mapping[str, object]) -> str:
    """A server-sent event as OpenAI sends them: the type in the event and in the data."""
    return f"event: {kind}\ndata: {dumps({'type': kind, **body})}\n\n"


def models_answer(models: Iterable[ModelSpec], aliases: Mapping[str, str]) -> dict[str, object]:
    """The list of models, ours and the names they also go by."""
    own = {facts.name: facts.revision for facts in models}
    names = [*own, *(alias for alias, name in aliases.items() if name in own and alias not in own)]
    return {"object": "list", "data": [model_answer(name, own[aliases.get(name, name)]) for name in names]}


def model_answer(name: str, revision: str) -> dict[str, object]:
    """One model; `revision` names its weights."""
    return {"id": name, "object": "model", "created": 0, "owned_by": "stable-diffusion-server", "revision": revision}


def _datum(parameters: ImagesParams, made: GeneratedImage) -> dict[str, object]:
    receipt = made.receipt
    picture = {"b64_json": text_of(made.file)} if parameters.as_text else {"url": made.url}
    revised = {"revised_prompt": receipt.prompt_used} if receipt.prompt_used else {}
    facts = {"key": receipt.key, "seed": receipt.seed, "model": receipt.model, "cached": receipt.cached}
    return {**picture, **revised, **facts}


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


def _format_of(made: GeneratedImage) -> str:
    if made.file:
        return _format(made.file)
    ending = made.receipt.key.rsplit(".", 1)[-1].lower()
    return {"jpg": "jpeg"}.get(ending, ending if ending in ("png", "jpeg", "webp") else "webp")


def _format(file: bytes) -> str:
    return media_type_of(file).removeprefix("image/")
