"""Wire shapes: what may be sent, read from query and body alike, and turned into an Order. Knows no policy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from functools import lru_cache
from typing import Any, ClassVar

from fastapi import Request
from pydantic import BaseModel, Field

from stable_diffusion_server.api.aside import run_if_large
from stable_diffusion_server.api.base64_images import bytes_of, is_data_url
from stable_diffusion_server.api.dependencies import caller_of, scope_to_caller
from stable_diffusion_server.api.error_bodies import problem_body
from stable_diffusion_server.api.request_parsing import BODY_TYPES, read_query
from stable_diffusion_server.api.schemas.params import File, GenerationParams, read_as, validated
from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.generation import RequestLimits
from stable_diffusion_server.jobs import JobStatus
from stable_diffusion_server.types import Format, GenerationRequest, GenerationResult, ImageInput, Task


class NativeParams(GenerationParams, ABC):
    """What every door of our own takes."""

    format: Format | None = Field(None, description="File format; without it the ending of `save_path`, else webp.")
    quality: int | None = Field(None, description="1 to 100; webp at 100 is lossless.")
    webhook_url: str | None = Field(
        None, description="Address to be told how the job ends; with `Prefer: respond-async` only."
    )

    @abstractmethod
    def order(self) -> GenerationRequest:
        """The order these parameters make."""


class TextToImageParams(NativeParams):
    """Parameters of text to image. The defaults are the original server's."""

    width: int = Field(1024, description="Width of the picture in pixels.")
    height: int = Field(1024, description="Height of the picture in pixels.")

    def order(self) -> GenerationRequest:
        """The order these parameters make."""
        return GenerationRequest(task=Task.TEXT_TO_IMAGE, **self.to_request_fields())


class ImageToImageParams(NativeParams):
    """Parameters of image to image. The defaults are the original server's."""

    files: ClassVar[frozenset[str]] = frozenset({"image_file"})
    pictures: ClassVar[frozenset[str]] = frozenset({"image_url"})

    image_url: str | None = Field(
        None, description="Address of the picture to start from, or the picture in a data URL; or send `image_file`."
    )
    image_file: File = Field(None, description="The picture to start from, a PNG, JPEG or WebP file.")
    strength: float = Field(0.6, description="How much is drawn anew, 0 to 1.")
    canny: bool | None = Field(False, description="Keep to the edges of the picture by ControlNet.")
    canny_low: int = Field(100, description="Gradient above which what touches an edge is one.")
    canny_high: int = Field(200, description="Gradient above which an edge is one.")
    control_scale: float | None = Field(
        None, description="How strongly to keep to the edges; by default the model's own value."
    )

    def order(self) -> GenerationRequest:
        """The order these parameters make. Raises `InvalidInput` unless there is just one picture."""
        (image,) = _sources(self, "image")
        return GenerationRequest(task=Task.IMAGE_TO_IMAGE, image=image, **self.to_request_fields())


class ImageToImageUploadParams(ImageToImageParams):
    """Parameters of image to image for an uploaded file, whose name in the bucket tells the content."""

    canny: bool | None = Field(None, description="The same; without it where the model has a ControlNet.")

    def order(self) -> GenerationRequest:
        """The order these parameters make. Raises `InvalidInput` unless there is just one picture."""
        return replace(super().order(), named_by_content=True)


class InpaintParams(NativeParams):
    """Parameters of inpainting: white parts of the mask are repainted, black ones stay as they are."""

    files: ClassVar[frozenset[str]] = frozenset({"image_file", "mask_file"})
    pictures: ClassVar[frozenset[str]] = frozenset({"image_url", "mask_url"})

    image_url: str | None = Field(
        None, description="Address of the picture to repaint, or a data URL; or send `image_file`."
    )
    image_file: File = Field(None, description="The picture to repaint, a PNG, JPEG or WebP file.")
    mask_url: str | None = Field(
        None, description="Address of the mask, white where to repaint, or a data URL; or send `mask_file`."
    )
    mask_file: File = Field(None, description="The mask, a PNG, JPEG or WebP file of any size.")
    strength: float = Field(1.0, description="How much is drawn anew inside the mask, 0 to 1.")
    feather: int = Field(0, description="Pixels over which the repainted part fades in from the rim of the mask.")
    refine: bool = Field(True, description="A second pass at low strength over what was drawn.")

    def order(self) -> GenerationRequest:
        """The order these parameters make. Raises `InvalidInput` unless there is one picture and one mask."""
        image, mask = _sources(self, "image", "mask")
        return GenerationRequest(task=Task.INPAINT, image=image, mask=mask, **self.to_request_fields())


_TOLD = tuple(part.name for part in fields(GenerationResult))


# The longest query, in bytes, of which the order is kept at hand.
_SHORT = 1024


@lru_cache(1024)
def _order_of(schema: type[NativeParams], query_string: bytes) -> GenerationRequest:
    """The order in a query. The same ones come again and again, and reading one is pure."""
    return validated(schema, read_query(query_string)).order()


async def read_generation_request(request: Request, schema: type[NativeParams]) -> GenerationRequest:
    """The order in a request's query and body (form, multipart or JSON).

    Raises `MalformedRequest`, `UnsupportedMedia`, `InvalidInput`, which names every refused parameter, and `Forbidden`
    for a name that is not the caller's.
    """
    query = request.scope["query_string"]
    if request.method == "GET" and len(query) <= _SHORT:
        return scope_to_caller(caller_of(request), _order_of(schema, query))
    parameters = await read_as(schema, request)
    size = sum(len(getattr(parameters, name) or "") for name in schema.pictures)
    return scope_to_caller(caller_of(request), await run_if_large(size, parameters.order))


def result_body(receipt: GenerationResult, url: str) -> dict[str, object]:
    """A receipt as JSON shows it, with the URL of the picture as `path`; `prompt_used` only when it differs."""
    # Field by field: `asdict` copies deeply, which is most of what a cached answer would cost.
    body: dict[str, object] = {"path": url, **{name: getattr(receipt, name) for name in _TOLD}}
    body["warnings"] = [{"code": warned.code, "message": warned.message} for warned in receipt.warnings]
    body["timings"] = dict(receipt.timings)
    if receipt.prompt_used is None:
        del body["prompt_used"]
    return body


def job_body(standing: JobStatus, url: Callable[[str], str]) -> dict[str, object]:
    """A job as JSON shows it, with the receipt of one that is done, or the problem of one that failed."""
    body = asdict(standing)
    outcome = standing.outcome
    del body["outcome"]
    if isinstance(outcome, GenerationResult):
        body["receipt"] = result_body(outcome, url(outcome.key))
    elif outcome is not None:
        body["problem"] = problem_body(outcome.as_error())
    return body


def documented(
    schema: type[BaseModel], limits: RequestLimits, method: str, kinds: tuple[str, ...] = BODY_TYPES
) -> dict[str, Any]:
    """OpenAPI of an operation whose parameters `read_parameters` reads, with the bounds the settings set.

    `kinds` are the media types its body may have.
    """
    properties = properties_of(schema, limits)
    required = [name for name, part in schema.model_fields.items() if part.is_required()]
    files = {name for name, shape in properties.items() if _is_file(shape)}
    words = {name: shape for name, shape in properties.items() if name not in files}
    if method == "GET":
        return {
            "parameters": [
                {
                    "name": name,
                    "in": "query",
                    "required": name in required,
                    "schema": shape,
                    "description": shape.pop("description", ""),
                }
                for name, shape in words.items()
            ]
        }

    def body(shapes: dict[str, Any]) -> dict[str, Any]:
        shape = {"type": "object", "required": required, "properties": shapes, "additionalProperties": False}
        return {"schema": shape}

    content = {kind: body(properties if kind == "multipart/form-data" else words) for kind in kinds}
    return {"requestBody": {"required": bool(required), "content": content}}


def properties_of(schema: type[BaseModel], limits: RequestLimits) -> dict[str, Any]:
    """The parameters of a schema, as JSON Schema with the bounds the settings set."""
    whole = _json_schema_of(schema)
    properties: dict[str, Any] = _inlined(whole["properties"], whole.get("$defs", {}))
    for name, (low, high) in limits.bounds().items():
        if name in properties:
            _bound(properties[name], low, high)
    for name in ("prompt", "negative_prompt"):
        for part in _parts(properties.get(name, {})):
            part["maxLength"] = limits.max_prompt_characters
            if name == "prompt":
                part["minLength"] = 1
    return properties


@lru_cache(64)
def _json_schema_of(schema: type[BaseModel]) -> dict[str, Any]:
    """Pydantic's JSON Schema of a class, made once per process: an app uses 15, which took 60 % of `create_app`."""
    return schema.model_json_schema()


def _parts(shape: dict[str, Any]) -> list[dict[str, Any]]:
    """The kinds of text a property may be."""
    return [part for part in [shape, *shape.get("anyOf", [])] if part.get("type") == "string"]


def _is_file(shape: dict[str, Any]) -> bool:
    return shape.get("format") == "binary" or shape.get("items", {}).get("format") == "binary"


def _inlined(shape: Any, definitions: dict[str, Any]) -> Any:
    """A schema with each reference replaced by what it refers to, since its definitions stay behind."""
    if isinstance(shape, list):
        return [_inlined(part, definitions) for part in shape]
    if not isinstance(shape, dict):
        return shape
    if (reference := shape.get("$ref")) is not None:
        return _inlined(definitions[reference.rsplit("/", 1)[1]], definitions)
    return {name: _inlined(part, definitions) for name, part in shape.items()}


def _bound(shape: dict[str, Any], low: float, high: float) -> None:
    """Write bounds into the numeric part of a property."""
    for part in [shape, *shape.get("anyOf", [])]:
        if part.get("type") in ("integer", "number"):
            part.update(minimum=low, maximum=high)


def _sources(parameters: NativeParams, *names: str) -> list[ImageInput]:
    """The pictures of those names, each by its URL or as a file. Raises `InvalidInput` for both, or neither."""
    sources, faults = [], []
    for name in names:
        by_url, by_file = f"{name}_url", f"{name}_file"
        url, file = getattr(parameters, by_url), getattr(parameters, by_file)
        if (url is None) == (file is None):
            sentence = f"Give {by_url} or {by_file}, and not both."
            faults += [(by_url, sentence), (by_file, sentence)]
        elif file is not None:
            sources.append(ImageInput(by_file, data=file.data))
        elif is_data_url(url):
            sources.append(ImageInput(by_url, data=bytes_of(url, by_url)))
        else:
            sources.append(ImageInput(by_url, url=url))
    if faults:
        raise InvalidInput.from_faults(faults)
    return sources
