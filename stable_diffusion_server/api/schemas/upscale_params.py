"""Parameters of the route that enlarges an image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from stable_diffusion_server.api.base64_images import input_images
from stable_diffusion_server.api.schemas.params import File, type_faults_of
from stable_diffusion_server.api.schemas.validation import RequestedGeneration
from stable_diffusion_server.generation import DEFAULT_UPSCALER, NAME_MAX
from stable_diffusion_server.types import Format, GenerationRequest, Task

_NUMBERS = frozenset({"scale", "width", "height", "quality", "timeout"})


class UpscaleParams(RequestedGeneration):
    """Parameters of an enlargement. `RequestLimits` checks their bounds, which are settings."""

    files: ClassVar[frozenset[str]] = frozenset({"image_file"})
    pictures: ClassVar[frozenset[str]] = frozenset({"image_url"})
    numbers: ClassVar[frozenset[str]] = _NUMBERS
    booleans: ClassVar[frozenset[str]] = frozenset({"overwrite"})

    image_url: str | None = Field(
        None, description="URL of the image, or the image in a data URL; or send `image_file`."
    )
    image_file: File = Field(None, description="The image, a PNG, JPEG or WebP file.")
    upscaler: str | None = Field(
        None,
        max_length=NAME_MAX,
        description=f"Name of the upscaler; `/sdapi/v1/upscalers` lists them. If omitted, `{DEFAULT_UPSCALER}`.",
    )
    scale: float | None = Field(None, description="Factor of both sides. If omitted with width and height, 2.")
    width: int | None = Field(None, description="Width of the result in pixels, with `height` in place of `scale`.")
    height: int | None = Field(
        None, description="Height of the result in pixels; what exceeds the aspect ratio is cut off evenly."
    )
    save_path: str | None = Field(
        None, description="Object key of the result. If omitted, the key is derived from image, upscaler and size."
    )
    format: Format | None = Field(
        None, description="File format. If omitted, the extension of `save_path` decides, otherwise webp."
    )
    quality: int | None = Field(None, description="1 to 100; webp at 100 is lossless.")
    overwrite: bool = Field(False, description="Enlarge and store even if the key exists.")
    timeout: float | None = Field(None, description="Maximum seconds to wait for the result.")
    webhook_url: str | None = Field(
        None, description="URL that is notified when the job ends; only with `Prefer: respond-async`."
    )

    def to_request_fields(self) -> dict[str, Any]:
        """Return the fields of a `GenerationRequest`, without the image."""
        return {"prompt": "", "loras": (), **self.model_dump(exclude={"image_url", "image_file"})}

    def to_request(self) -> GenerationRequest:
        """Return the request these parameters describe. Raises `InvalidInput` unless there is exactly one image."""
        (image,) = input_images(self, "image")
        return GenerationRequest(task=Task.UPSCALE, image=image, **self.to_request_fields())

    @classmethod
    def type_faults(cls, parameters: Mapping[str, Any]) -> list[tuple[str, str]]:
        """Return the booleans for numbers, and in JSON the texts for numbers and booleans."""
        return type_faults_of(parameters, cls.numbers, cls.booleans)
