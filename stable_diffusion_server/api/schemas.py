"""Wire shapes: what may be sent, read from query and body alike, and turned into an Order. Knows no policy."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any, Literal, NoReturn

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException

from stable_diffusion_server.errors import InvalidInput, Malformed, UnsupportedMedia
from stable_diffusion_server.orders import Format, Limits, Order, Receipt, Task

_FORM_TYPES = ("application/x-www-form-urlencoded", "multipart/form-data")
_MAX_FIELDS = 100


class Parameters(BaseModel):
    """What every drawing endpoint takes. Bounds are checked by `Limits`, which the settings decide."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    prompt: str = Field(description="What to draw.", examples=["a red circle on a blue background"])
    save_path: str | None = Field(None, description="Name of the picture in the bucket. Without it a name is made.")
    model: str | None = Field(None, description="`flux` or `sdxl`.")
    negative_prompt: str | None = Field(None, description="What not to draw, for models that have a use for it.")
    seed: int | Literal["random"] | None = Field(
        None,
        description="Start of the noise; without it one is made from the order, so that it is the same each time.",
    )
    num_inference_steps: int | None = Field(None, description="Denoising steps.")
    guidance_scale: float | None = Field(None, description="How strongly to follow the prompt.")
    scheduler: str | None = Field(None, description="Scheduler by its name in the catalogue.")
    format: Format | None = Field(None, description="File format; without it the ending of `save_path`, else webp.")
    quality: int | None = Field(None, description="1 to 100; webp at 100 is lossless.")
    overwrite: bool = Field(False, description="Draw and store even if the name is taken.")
    timeout: float | None = Field(None, description="Seconds to wait for the picture at the most.")

    @model_validator(mode="before")
    @classmethod
    def _no_booleans_as_numbers(cls, data: Any) -> Any:
        """Refuse `true` where a number belongs, which Python would take for 1."""
        numbers = {"seed", "num_inference_steps", "guidance_scale", "quality", "timeout", "width", "height"}
        for name, value in data.items() if isinstance(data, dict) else ():
            if isinstance(value, bool) and name in numbers:
                raise InvalidInput(f"{name} must be a number, not {str(value).lower()}.", field=name)
        return data


class TextToImage(Parameters):
    """Parameters of text to image. The defaults are the original server's."""

    width: int = Field(1024, description="Width of the picture in pixels.")
    height: int = Field(1024, description="Height of the picture in pixels.")

    def order(self) -> Order:
        """The order these parameters make."""
        return Order(task=Task.TEXT_TO_IMAGE, **self.model_dump())


async def read_text_to_image(request: Request) -> Order:
    """The order in a request's query and body (form, multipart or JSON).

    Raises `Malformed`, `UnsupportedMedia` and `InvalidInput`, which names every refused parameter.
    """
    try:
        return TextToImage.model_validate(await read_parameters(request)).order()
    except ValidationError as error:
        _refuse(error)


async def read_parameters(request: Request) -> dict[str, object]:
    """Query and body of a request as one mapping. A parameter given twice is refused, wherever it stands."""
    merged: dict[str, object] = {}
    for name, value in [*request.query_params.multi_items(), *(await _read_body(request))]:
        if not name.isascii():
            # Every parameter's name is ASCII, and pydantic cannot tell a lone surrogate from a name.
            raise InvalidInput(f"{name[:100]} is not a parameter here.", field=name[:100])
        if name in merged:
            raise Malformed(f"{name[:100]} is given more than once.", field=name[:100])
        merged[name] = value
    return merged


def receipt_body(receipt: Receipt, url: str) -> dict[str, object]:
    """A receipt as JSON shows it, with the URL of the picture as `path`; `prompt_used` only when it differs."""
    body: dict[str, object] = {"path": url, **asdict(receipt)}
    if receipt.prompt_used is None:
        del body["prompt_used"]
    return body


def documented(schema: type[BaseModel], limits: Limits, method: str) -> dict[str, Any]:
    """OpenAPI of an operation whose parameters `read_parameters` reads, with the bounds the settings set."""
    properties = schema.model_json_schema()["properties"]
    for name, (low, high) in limits.bounds().items():
        if name in properties:
            _bound(properties[name], low, high)
    required = [name for name, field in schema.model_fields.items() if field.is_required()]
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
                for name, shape in properties.items()
            ]
        }
    body = {"type": "object", "required": required, "properties": properties, "additionalProperties": False}
    types = ("application/json", *_FORM_TYPES)
    return {"requestBody": {"required": True, "content": {kind: {"schema": body} for kind in types}}}


def _bound(shape: dict[str, Any], low: float, high: float) -> None:
    """Write bounds into the numeric part of a property."""
    for part in [shape, *shape.get("anyOf", [])]:
        if part.get("type") in ("integer", "number"):
            part.update(minimum=low, maximum=high)


async def _read_body(request: Request) -> list[tuple[str, object]]:
    if request.method == "GET" or request.headers.get("content-length") == "0":
        return []
    media_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if media_type == "application/json":
        return _read_json(await request.body())
    if media_type in _FORM_TYPES:
        return await _read_form(request)
    if not media_type and not await request.body():
        return []
    raise UnsupportedMedia(f"Send application/json or one of {', '.join(_FORM_TYPES)}.")


def _read_json(body: bytes) -> list[tuple[str, object]]:
    def not_a_number(name: str) -> NoReturn:
        raise Malformed(f"{name} is not JSON.")

    def every_pair(pairs: list[tuple[str, object]]) -> object:
        # The outermost object comes last; as pairs, so that a name given twice is seen.
        return pairs

    try:
        parsed = json.loads(body, object_pairs_hook=every_pair, parse_constant=not_a_number)
    except (ValueError, RecursionError) as error:
        raise Malformed("The body is not valid JSON.") from error
    if not body.lstrip().startswith(b"{"):
        raise Malformed("The body must be a JSON object.")
    pairs: list[tuple[str, object]] = parsed
    return pairs


async def _read_form(request: Request) -> list[tuple[str, object]]:
    try:
        async with request.form(max_files=0, max_fields=_MAX_FIELDS) as form:
            items: list[tuple[str, object]] = list(form.multi_items())
    except MultiPartException as error:
        raise Malformed(f"The form could not be read ({error.message}).") from error
    for name, value in items:
        if isinstance(value, UploadFile):
            raise InvalidInput(f"{name} takes no file here.", field=name)
    return items


def _refuse(error: ValidationError) -> NoReturn:
    """Turn pydantic's findings into one `InvalidInput`. Values are not repeated: they may be long, or secret."""
    faults: dict[str, str] = {}
    for fault in error.errors(include_url=False, include_input=False):
        name = str(fault["loc"][0])
        faults.setdefault(name[:100], _sentence(name, fault["type"], fault["msg"]))
    raise InvalidInput.of(list(faults.items())) from error


def _sentence(name: str, kind: str, message: str) -> str:
    if kind == "extra_forbidden":
        return f"{name[:100]} is not a parameter here."
    if kind == "missing":
        return f"{name} is missing."
    return f"{name}: {message[0].lower()}{message[1:]}."
