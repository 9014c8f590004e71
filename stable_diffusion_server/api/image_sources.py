"""Images in JSON and forms: a file of a form, an address, a data URL, base64, or an object with one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import BeforeValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from stable_diffusion_server.api.base64_images import bytes_of, is_data_url
from stable_diffusion_server.api.request_parsing import UploadedFile
from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.types import ImageInput

# Members of an object that hold an image, and members that say nothing more.
_SOURCES, _FURTHER = ("image_url", "url", "b64_json"), ("type", "detail", "file_id")
_ADDRESSES = ("http://", "https://")
# How base64 of a PNG, JPEG, WebP or GIF begins. Other texts are no images, even where they are base64.
_SIGNATURES = ("iVBORw0KGgo", "/9j/", "UklGR", "R0lGOD")
_LONGEST_ADDRESS_HEAD = 8
_TEXT = {"type": "string", "description": "An http(s) address, or a data URL."}
# A file in multipart; a text or an object in JSON.
SOURCE_SCHEMA = {
    "anyOf": [
        {"type": "string", "format": "binary"},
        _TEXT,
        {"type": "object", "properties": {"image_url": _TEXT}, "required": ["image_url"]},
    ]
}


@dataclass(frozen=True, slots=True)
class ImageSource:
    """An image in a request: the bytes of its file, or its http(s) address."""

    url: str | None = None
    data: bytes | None = field(default=None, repr=False)

    def to_input(self, parameter: str, *, transparency: bool = False) -> ImageInput:
        """Return the input image of a parameter; with `transparency` a mask whose transparent parts are repainted."""
        return ImageInput(parameter, url=self.url, data=self.data, transparency=transparency)


def read_source(value: object) -> object:
    """Return the `ImageSource` of a parameter's value. Raises `PydanticCustomError`."""
    if isinstance(value, UploadedFile):
        return ImageSource(data=value.data)
    if isinstance(value, Mapping):
        return _of_object(value)
    if isinstance(value, str):
        return _of_text(value)
    if value is None or isinstance(value, ImageSource):
        return value
    raise PydanticCustomError("image_source", "no image")


def _of_object(value: Mapping[str, Any]) -> ImageSource:
    given = {name: part for name, part in value.items() if part is not None}
    if "file_id" in given:
        raise PydanticCustomError(
            "file_id", "file_id names a file in a store that this server does not have; send image_url instead"
        )
    sources = [name for name in _SOURCES if name in given]
    if len(sources) != 1 or not set(given) <= {*_SOURCES, *_FURTHER}:
        raise PydanticCustomError("image_object", "an object has image_url, with an address or a data URL, alone")
    inner = given[sources[0]]
    if isinstance(inner, Mapping) and set(inner) <= {"url", "detail"}:
        inner = inner.get("url")  # as in chat messages
    if not isinstance(inner, str):
        raise PydanticCustomError("image_source", "no image")
    return ImageSource(data=_decoded(inner)) if sources == ["b64_json"] else _of_text(inner)


def _of_text(text: str) -> ImageSource:
    if text[:_LONGEST_ADDRESS_HEAD].lower().startswith(_ADDRESSES):
        return ImageSource(url=str(text))
    if is_data_url(text) or text.startswith(_SIGNATURES):
        return ImageSource(data=_decoded(text))
    raise PydanticCustomError("image_source", "no image")


def _decoded(text: str) -> bytes:
    try:
        return bytes_of(text, "image")
    except InvalidInput:
        raise PydanticCustomError("image_base64", "the text is not a picture in base64") from None


Source = Annotated[ImageSource, BeforeValidator(read_source), WithJsonSchema(SOURCE_SCHEMA)]
OptionalSource = Annotated[ImageSource | None, BeforeValidator(read_source), WithJsonSchema(SOURCE_SCHEMA)]
