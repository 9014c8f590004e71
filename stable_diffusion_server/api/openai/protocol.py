"""What the OpenAI Images API takes, turned into orders, and what of it cannot be honoured, told."""

from __future__ import annotations

import math
import re
from abc import abstractmethod
from dataclasses import replace
from typing import Any, ClassVar, Literal

from pydantic import Field

from stable_diffusion_server.api.dialect_context import DialectContext
from stable_diffusion_server.api.request_parsing import UploadedFile
from stable_diffusion_server.api.schemas.params import File, GenerationParams
from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.types import Fit, Format, GenerationRequest, ImageInput, RequestWarning, Task

_SIZE = re.compile(r"(\d{1,5})x(\d{1,5})")
# Steps against the model's default, and none at all where it is to decide.
_QUALITIES = {"low": 0.5, "high": 2.0, "hd": 2.0, "xhigh": 3.0, "max": 4.0}
_SIDE = 1024
_UNHEARD = {
    "style": "There are no styles here; the prompt says it.",
    "input_fidelity": "How much of the picture stays is said by `strength`.",
    "complexity": "There is no planning here.",
}


class ImagesParams(GenerationParams):
    """What both doors take. What is ours and not OpenAI's goes in `extra_body` of its clients."""

    n: int | None = Field(None, description="How many pictures; without a seed they differ.")
    size: str | None = Field(None, description="`WIDTHxHEIGHT` or `auto`.", examples=["1024x1024"])
    response_format: Literal["url", "b64_json"] | None = Field(
        None, description="Without it `url`, but for models named gpt-image-…, which answer `b64_json`."
    )
    output_format: Format | None = Field(None, description="Without it png, or what `save_path` ends in.")
    output_compression: int | None = Field(None, ge=0, le=100, description="Quality of webp and jpeg, 100 the best.")
    background: Literal["auto", "opaque", "transparent"] | None = Field(
        None, description="`transparent` is refused: no model here draws it."
    )
    quality: Literal["auto", "low", "medium", "high", "standard", "hd", "xhigh", "max"] | None = Field(
        None, description="`low` takes half the model's usual steps, `high` twice, `xhigh` three, `max` four times."
    )
    stream: bool | None = Field(None, description="Answer as server-sent events.")
    partial_images: int | None = Field(None, ge=0, le=3, description="With `stream`: pictures on the way, 0 to 3.")
    moderation: Literal["auto", "low"] | None = Field(None, description="Taken; nothing is moderated here.")
    user: str | None = Field(None, description="Taken, and not kept.")
    safety_identifier: str | None = Field(None, description="Taken, and not kept.")
    style: str | None = Field(None, description="Taken and not honoured; `warnings` says so.")
    input_fidelity: str | None = Field(None, description="Taken and not honoured; `warnings` says so.")
    complexity: str | None = Field(None, description="Taken and not honoured; `warnings` says so.")

    numbers: ClassVar[frozenset[str]] = GenerationParams.numbers - {"quality"}
    own: ClassVar[frozenset[str]] = frozenset(
        "n size response_format output_format output_compression background quality stream partial_images moderation "
        "user safety_identifier style input_fidelity complexity".split()
    )

    @abstractmethod
    def base(self, house: DialectContext) -> GenerationRequest:
        """The order of the first picture, without format, quality and steps."""

    @property
    def count(self) -> int:
        """How many pictures are asked for."""
        return 1 if self.n is None else self.n

    @property
    def as_text(self) -> bool:
        """Whether pictures go into the answer."""
        if self.response_format is None:
            return (self.model or "").startswith(("gpt-image", "chatgpt-image"))
        return self.response_format == "b64_json"

    def orders(self, house: DialectContext) -> list[GenerationRequest]:
        """An order for each picture. Raises `InvalidInput`."""
        self._check(house)
        facts = house.facts(self.model)
        base = self.base(house)
        steps = self.num_inference_steps
        if steps is None and self.quality in _QUALITIES:
            steps = min(max(1, math.ceil(facts.default_steps * _QUALITIES[self.quality])), house.limits.max_steps)
        file_format = self.output_format or (Format.PNG if self.save_path is None else None)
        compression = self.output_compression
        base = replace(
            base,
            model=facts.name if self.model else None,
            num_inference_steps=steps,
            format=file_format,
            quality=None if compression is None else max(1, compression),
        )
        return [replace(base, variation=number) for number in range(self.count)]

    def warnings(self) -> list[RequestWarning]:
        """What was asked for and cannot be honoured."""
        asked = {name: getattr(self, name) for name in _UNHEARD}
        return [RequestWarning("not-honoured", f"{name}: {_UNHEARD[name]}") for name, value in asked.items() if value]

    def pixels(self) -> tuple[int | None, int | None]:
        """Width and height asked for. Raises `InvalidInput`."""
        if self.size in (None, "auto"):
            return None, None
        match = _SIZE.fullmatch(self.size or "")
        if not match:
            raise InvalidInput("size must be WIDTHxHEIGHT in pixels, or auto.", field="size")
        return int(match[1]), int(match[2])

    def _check(self, house: DialectContext) -> None:
        faults = []
        if not 1 <= self.count <= house.max_n:
            faults.append(("n", f"n must be between 1 and {house.max_n}."))
        if self.count > 1 and self.save_path is not None:
            faults.append(("save_path", "save_path names one picture; leave it out, or ask for one."))
        if self.background == "transparent":
            faults.append(("background", "background cannot be transparent: no model here draws it."))
        if self.output_compression is not None and self.output_format in (None, Format.PNG):
            faults.append(("output_compression", "output_compression is for webp and jpeg; png loses nothing."))
        if self.partial_images and not self.stream:
            faults.append(("partial_images", "partial_images come with stream."))
        width, height = self.pixels()
        bounds = house.limits.bounds()
        for side, name in ((width, "width"), (height, "height")):
            low, high = bounds[name]
            if side is not None and not low <= side <= high:
                faults.append(("size", f"size: the {name} must be between {low:g} and {high:g}."))
        if faults:
            raise InvalidInput.from_faults(faults)
        if self.as_text:
            house.check_size(self.count, width or _SIDE, height or _SIDE, "n")

    def _shared(self) -> dict[str, Any]:
        return {name: value for name, value in self.to_request_fields().items() if name not in self.own}


class GenerateImagesParams(ImagesParams):
    """Parameters of text to image."""

    def base(self, house: DialectContext) -> GenerationRequest:
        """The order of the first picture."""
        width, height = self.pixels()
        words = {**self._shared(), "width": width or _SIDE, "height": height or _SIDE}
        return GenerationRequest(task=Task.TEXT_TO_IMAGE, **words)


class EditImageParams(ImagesParams):
    """Parameters of image to image, and with a mask of inpainting: what is transparent in it is repainted."""

    files: ClassVar[frozenset[str]] = frozenset({"image", "image[]", "mask"})
    lists: ClassVar[frozenset[str]] = frozenset({"image", "image[]"})

    image: tuple[File, ...] = Field((), description="The picture to edit; further ones are not used, and told so.")
    mask: File = Field(None, description="Its transparent parts are repainted; of any size.")
    strength: float | None = Field(None, description="How much is drawn anew, 0 to 1: 0.6, with a mask 1.")
    feather: int = Field(0, description="Pixels over which the repainted part fades in from the rim of the mask.")
    refine: bool = Field(False, description="A second pass at low strength; unless said, where there is a mask.")
    canny: bool | None = Field(False, description="Keep to the edges of the picture by ControlNet.")
    canny_low: int = Field(100, description="Gradient above which what touches an edge is one.")
    canny_high: int = Field(200, description="Gradient above which an edge is one.")
    control_scale: float | None = Field(None, description="How strongly to keep to the edges.")

    def base(self, house: DialectContext) -> GenerationRequest:
        """The order of the first picture."""
        pictures = [picture for picture in self.image if isinstance(picture, UploadedFile)]
        if not pictures:
            raise InvalidInput("image must be sent as a file of a multipart form.", field="image")
        width, height = self.pixels()
        words = self._shared()
        strength, refine = words.pop("strength"), words.pop("refine")
        return GenerationRequest(
            task=Task.INPAINT if self.mask else Task.IMAGE_TO_IMAGE,
            image=ImageInput("image", data=pictures[0].data),
            mask=ImageInput("mask", data=self.mask.data, transparency=True) if self.mask else None,
            strength=strength if strength is not None else (1.0 if self.mask else 0.6),
            refine=refine if "refine" in self.model_fields_set else bool(self.mask),
            fit=Fit.CROP,
            width=width,
            height=height,
            **words,
        )

    def warnings(self) -> list[RequestWarning]:
        """What was asked for and cannot be honoured."""
        more = [RequestWarning("images-unused", "One picture is edited, the first; the others are not used.")]
        return [*super().warnings(), *(more if len(self.image) > 1 else [])]
