"""Parameters of the OpenAI Images API, converted to generation requests, with warnings about ignored ones."""

from __future__ import annotations

import math
import re
from abc import abstractmethod
from dataclasses import replace
from typing import Any, ClassVar, Literal

from pydantic import Field

from stable_diffusion_server.api.dependencies import DialectContext
from stable_diffusion_server.api.request_parsing import UploadedFile
from stable_diffusion_server.api.schemas.params import File, GenerationParams
from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.types import Fit, Format, GenerationRequest, ImageInput, RequestWarning, Task

_SIZE = re.compile(r"(\d{1,5})x(\d{1,5})")
# Steps as a multiple of the model's default; other values leave the default.
_STEP_FACTORS = {"low": 0.5, "high": 2.0, "hd": 2.0, "xhigh": 3.0, "max": 4.0}
_DEFAULT_SIDE = 1024
_IGNORED = {
    "style": "There are no styles here; the prompt says it.",
    "input_fidelity": "How much of the picture stays is said by `strength`.",
    "complexity": "There is no planning here.",
}


class ImagesParams(GenerationParams):
    """Parameters of both routes. OpenAI's clients send those of this server in `extra_body`."""

    n: int | None = Field(
        None,
        description="Number of images. Without `seed` each has its own seed; with `seed`, image i uses `seed + i`.",
    )
    size: str | None = Field(None, description="`WIDTHxHEIGHT` or `auto`.", examples=["1024x1024"])
    response_format: Literal["url", "b64_json"] | None = Field(
        None, description="If omitted `url`, or `b64_json` for models named gpt-image-…."
    )
    output_format: Format | None = Field(
        None, description="If omitted, the extension of `save_path` decides, otherwise png."
    )
    output_compression: int | None = Field(None, ge=0, le=100, description="Quality of webp and jpeg; 100 is the best.")
    background: Literal["auto", "opaque", "transparent"] | None = Field(
        None, description="`transparent` is an error: no model supports it."
    )
    quality: Literal["auto", "low", "medium", "high", "standard", "hd", "xhigh", "max"] | None = Field(
        None,
        description="Steps relative to the model's default: `low` half, `high` double, `xhigh` triple, `max` fourfold.",
    )
    stream: bool | None = Field(None, description="Respond with server-sent events.")
    partial_images: int | None = Field(None, ge=0, le=3, description="With `stream`: number of previews, 0 to 3.")
    moderation: Literal["auto", "low"] | None = Field(
        None, description="Accepted and ignored: this server does not moderate."
    )
    user: str | None = Field(None, description="Accepted and not stored.")
    safety_identifier: str | None = Field(None, description="Accepted and not stored.")
    style: str | None = Field(None, description="Accepted and ignored, with a warning.")
    input_fidelity: str | None = Field(None, description="Accepted and ignored, with a warning.")
    complexity: str | None = Field(None, description="Accepted and ignored, with a warning.")

    numbers: ClassVar[frozenset[str]] = GenerationParams.numbers - {"quality"}
    # Azure's clients send it with every request.
    ignored: ClassVar[frozenset[str]] = frozenset({"api-version"})
    own: ClassVar[frozenset[str]] = frozenset(
        "n size response_format output_format output_compression background quality stream partial_images moderation "
        "user safety_identifier style input_fidelity complexity".split()
    )

    @abstractmethod
    def base(self, context: DialectContext) -> GenerationRequest:
        """Return the request of the first image, without format, quality and steps."""

    @property
    def count(self) -> int:
        """The number of images."""
        return 1 if self.n is None else self.n

    @property
    def as_base64(self) -> bool:
        """Whether the response holds the images in base64."""
        if self.response_format is None:
            return (self.model or "").startswith(("gpt-image", "chatgpt-image"))
        return self.response_format == "b64_json"

    def to_requests(self, context: DialectContext) -> list[GenerationRequest]:
        """Return a request for each image. Raises `InvalidInput`."""
        self._check(context)
        spec = context.model(self.model)
        base = self.base(context)
        steps = self.num_inference_steps
        if steps is None and self.quality in _STEP_FACTORS:
            steps = min(max(1, math.ceil(spec.default_steps * _STEP_FACTORS[self.quality])), context.limits.max_steps)
        file_format = self.output_format or (Format.PNG if self.save_path is None else None)
        compression = self.output_compression
        base = replace(
            base,
            model=spec.name if self.model else None,
            num_inference_steps=steps,
            format=file_format,
            quality=None if compression is None else max(1, compression),
        )
        return [replace(base, variation=number) for number in range(self.count)]

    def warnings(self) -> list[RequestWarning]:
        """Return warnings about parameters that were ignored."""
        ignored = {name: getattr(self, name) for name in _IGNORED}
        return [RequestWarning("not-honoured", f"{name}: {_IGNORED[name]}") for name, value in ignored.items() if value]

    def pixels(self) -> tuple[int | None, int | None]:
        """Return width and height in pixels, `None` for `auto`. Raises `InvalidInput`."""
        if self.size in (None, "auto"):
            return None, None
        match = _SIZE.fullmatch(self.size or "")
        if not match:
            raise InvalidInput("size must be WIDTHxHEIGHT in pixels, or auto.", field="size")
        return int(match[1]), int(match[2])

    def _check(self, context: DialectContext) -> None:
        faults = []
        if not 1 <= self.count <= context.max_n:
            faults.append(("n", f"n must be between 1 and {context.max_n}."))
        if self.count > 1 and self.save_path is not None:
            faults.append(("save_path", "save_path names one picture; leave it out, or ask for one."))
        if self.background == "transparent":
            faults.append(("background", "background cannot be transparent: no model here draws it."))
        if self.output_compression is not None and self.output_format in (None, Format.PNG):
            faults.append(("output_compression", "output_compression is for webp and jpeg; png loses nothing."))
        if self.partial_images and not self.stream:
            faults.append(("partial_images", "partial_images come with stream."))
        width, height = self.pixels()
        bounds = context.limits.bounds()
        for side, name in ((width, "width"), (height, "height")):
            low, high = bounds[name]
            if side is not None and not low <= side <= high:
                faults.append(("size", f"size: the {name} must be between {low:g} and {high:g}."))
        if faults:
            raise InvalidInput.from_faults(faults)
        if self.as_base64:
            context.check_size(self.count, width or _DEFAULT_SIDE, height or _DEFAULT_SIDE, "n")

    def _shared(self) -> dict[str, Any]:
        return {name: value for name, value in self.to_request_fields().items() if name not in self.own}


class GenerateImagesParams(ImagesParams):
    """Parameters of text to image."""

    def base(self, context: DialectContext) -> GenerationRequest:
        """Return the request of the first image."""
        width, height = self.pixels()
        fields = {**self._shared(), "width": width or _DEFAULT_SIDE, "height": height or _DEFAULT_SIDE}
        return GenerationRequest(task=Task.TEXT_TO_IMAGE, **fields)


class EditImageParams(ImagesParams):
    """Parameters of image to image, or with a mask of inpainting: its transparent parts are repainted."""

    files: ClassVar[frozenset[str]] = frozenset({"image", "image[]", "mask"})
    lists: ClassVar[frozenset[str]] = frozenset({"image", "image[]"})

    image: tuple[File, ...] = Field((), description="The image to edit. Further images are ignored, with a warning.")
    mask: File = Field(None, description="Image of any size whose transparent parts are repainted.")
    strength: float | None = Field(None, description="How much is changed, 0 to 1. If omitted 0.6, with a mask 1.")
    feather: int = Field(0, description="Pixels over which the repainted part fades in from the border of the mask.")
    refine: bool = Field(
        False, description="Run a second pass at low strength over the image. If omitted, only with a mask."
    )
    canny: bool | None = Field(False, description="Keep the edges of the image, with a ControlNet.")
    canny_low: int = Field(100, description="Lower Canny threshold: pixels above it that touch an edge belong to it.")
    canny_high: int = Field(200, description="Upper Canny threshold: pixels above it are edges.")
    control_scale: float | None = Field(None, description="How strongly to keep the edges.")

    def base(self, context: DialectContext) -> GenerationRequest:
        """Return the request of the first image."""
        images = [image for image in self.image if isinstance(image, UploadedFile)]
        if not images:
            raise InvalidInput("image must be sent as a file of a multipart form.", field="image")
        width, height = self.pixels()
        fields = self._shared()
        strength, refine = fields.pop("strength"), fields.pop("refine")
        return GenerationRequest(
            task=Task.INPAINT if self.mask else Task.IMAGE_TO_IMAGE,
            image=ImageInput("image", data=images[0].data),
            mask=ImageInput("mask", data=self.mask.data, transparency=True) if self.mask else None,
            strength=strength if strength is not None else (1.0 if self.mask else 0.6),
            refine=refine if "refine" in self.model_fields_set else bool(self.mask),
            fit=Fit.CROP,
            width=width,
            height=height,
            **fields,
        )

    def warnings(self) -> list[RequestWarning]:
        """Return warnings about parameters that were ignored."""
        more = [RequestWarning("images-unused", "One picture is edited, the first; the others are not used.")]
        return [*super().warnings(), *(more if len(self.image) > 1 else [])]
