"""Parameters of the OpenAI Images API, converted to generation requests, with warnings about ignored ones."""

from __future__ import annotations

import math
import re
from abc import abstractmethod
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal, TypeVar

from fastapi import Request
from pydantic import Field

from stable_diffusion_server.api.concurrency import run_if_large, text_size
from stable_diffusion_server.api.dependencies import DialectContext, caller_of
from stable_diffusion_server.api.openai.guidance import guidance_warnings, true_guidance_faults, with_true_guidance
from stable_diffusion_server.api.request_parsing import read_parameters
from stable_diffusion_server.api.schemas.params import GenerationParams
from stable_diffusion_server.api.schemas.validation import validated
from stable_diffusion_server.errors import InvalidInput, ModelNotFound
from stable_diffusion_server.generation import range_sentence
from stable_diffusion_server.pipelines import TRUE_GUIDANCE, ModelSpec, scheduler_of
from stable_diffusion_server.types import Format, GenerationRequest, RequestWarning, Task

P = TypeVar("P", bound="ImagesParams")

_SIZE = re.compile(r"([0-9]{1,5})x([0-9]{1,5})")
# Steps as a multiple of the model's default; other values leave the default.
_STEP_FACTORS = {"low": 0.5, "high": 2.0, "hd": 2.0, "xhigh": 3.0, "max": 4.0}
_DEFAULT_SIDE = 1024
_BASE64_MODELS = ("gpt-image-", "chatgpt-image-")
# Parameters of OpenAI without effect here, and why.
_IGNORED = {
    "style": "Those of OpenAI are not here; write it into the prompt, or name one of STYLES_FILE in `styles`.",
    "input_fidelity": "`strength` says how much of the image changes.",
    "complexity": "There is no planning here.",
    "effort": "There is no planning here.",
    "reasoning": "There is no planning here.",
    "moderation": "This server does not moderate.",
    "svg": "Images are made of pixels here.",
    "frame_count": "Images have one frame here.",
    "frame_duration_ms": "Images have one frame here.",
}
_IGNORED_FIELD = Field(None, description="Accepted and ignored, with a warning.")


class ImagesParams(GenerationParams):
    """Parameters of all routes. OpenAI's clients send those of this server in `extra_body`."""

    n: int | None = Field(
        None,
        description="Number of images. Without `seed` each has its own seed; with `seed`, image i uses `seed + i`.",
    )
    size: str | None = Field(None, description="`WIDTHxHEIGHT` or `auto`.", examples=["1024x1024"])
    width: int | None = Field(None, description="Width in pixels, if `size` is omitted.")
    height: int | None = Field(None, description="Height in pixels, if `size` is omitted.")
    seed: int | Literal["random"] | None = Field(
        None, description="Seed of the noise. Omitted, `random` or -1: another image each time."
    )
    response_format: Literal["url", "b64_json"] | None = Field(
        None,
        description="If omitted `b64_json` for models named gpt-image-… or chatgpt-image-… and for edits, else `url`.",
    )
    output_format: Format | None = Field(
        None, description="If omitted, the extension of `save_path` decides, otherwise png."
    )
    output_compression: int | None = Field(
        None, ge=0, le=100, description="Quality of webp and jpeg; 100 is the best, and all that png can have."
    )
    background: Literal["auto", "opaque", "transparent"] | None = Field(
        None, description="`transparent` gives an opaque image and a warning: no model supports it."
    )
    quality: Literal["auto", "low", "medium", "high", "standard", "hd", "xhigh", "max"] | None = Field(
        None,
        description="Steps relative to the model's default: `low` half, `high` double, `xhigh` triple, `max` fourfold.",
    )
    stream: bool | None = Field(None, description="Respond with server-sent events.")
    partial_images: int | None = Field(None, ge=0, le=3, description="With `stream`: number of previews, 0 to 3.")
    true_cfg_scale: float | None = Field(
        None,
        description=(
            "How strongly to follow the prompt against the negative one, for models that have this beside "
            "`guidance_scale`, as FLUX.1 dev; for others the same as `guidance_scale`."
        ),
    )
    moderation: Literal["auto", "low"] | None = _IGNORED_FIELD
    user: str | None = Field(None, description="Accepted and not stored.")
    safety_identifier: str | None = Field(None, description="Accepted and not stored.")
    style: str | None = _IGNORED_FIELD
    input_fidelity: str | None = _IGNORED_FIELD
    complexity: str | None = _IGNORED_FIELD
    effort: str | None = _IGNORED_FIELD
    reasoning: Any = _IGNORED_FIELD
    svg: Any = _IGNORED_FIELD
    frame_count: int | None = _IGNORED_FIELD
    frame_duration_ms: int | None = _IGNORED_FIELD

    numbers: ClassVar[frozenset[str]] = (GenerationParams.numbers - {"quality"}) | {TRUE_GUIDANCE}
    # Azure's clients send it with every request.
    ignored: ClassVar[frozenset[str]] = frozenset({"api-version"})
    own: ClassVar[frozenset[str]] = frozenset(
        "n size response_format output_format output_compression background quality stream partial_images user "
        "safety_identifier width height true_cfg_scale".split()
    ) | set(_IGNORED)
    # Names of other servers with this API: sd.cpp, lemonade, sglang, vLLM-Omni, LocalAI.
    other_names: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("steps", "step", "num_steps", "sample_steps"), "num_inference_steps"),
        **dict.fromkeys(("cfg_scale", "cfg", "guidance"), "guidance_scale"),
        **dict.fromkeys(("sampler", "sampler_name", "sample_method"), "scheduler"),
        **dict.fromkeys(("num_images", "num_outputs"), "n"),
    }

    @abstractmethod
    def base(self, context: DialectContext) -> GenerationRequest:
        """Return the request of the first image, without format, quality and steps."""

    @property
    def count(self) -> int:
        """The number of images."""
        return 1 if self.n is None else self.n

    @property
    def as_base64(self) -> bool:
        """Whether the response holds the images in base64; `read_images_params` sets the default."""
        return self.response_format == "b64_json"

    def default_format(self, context: DialectContext) -> str:
        """Return the `response_format` of a request without one: url or b64_json."""
        if context.response_format != "auto":
            return context.response_format
        return "b64_json" if (self.model or "").startswith(_BASE64_MODELS) else "url"

    def to_requests(self, context: DialectContext) -> list[GenerationRequest]:
        """Return a request for each image. Raises `InvalidInput`."""
        spec = context.model(self.model)
        base = self.base(context)
        if self.true_cfg_scale is not None:
            base = with_true_guidance(base, self.true_cfg_scale, spec)
        base = replace(
            base,
            model=spec.name if self.model else None,
            at_least_one_step=True,
            seed="random" if self.seed in (None, -1) else self.seed,
            num_inference_steps=self._steps(spec, context),
            format=self.output_format or (Format.PNG if self.save_path is None else None),
            quality=None if self.output_compression is None else max(1, self.output_compression),
        )
        return [replace(base, variation=number) for number in range(self.count)]

    def warnings(self, context: DialectContext) -> list[RequestWarning]:
        """Return warnings about parameters that were ignored."""
        ignored = [f"{name}: {why}" for name, why in _IGNORED.items() if getattr(self, name)]
        if self.background == "transparent":
            ignored.append("background: the image is opaque; no model here draws transparency.")
        warnings = [RequestWarning("not-honoured", sentence) for sentence in ignored]
        if self.true_cfg_scale is not None:
            warnings += guidance_warnings(self.true_cfg_scale, self.guidance_scale, context.model(self.model))
        return warnings

    def pixels(self) -> tuple[int | None, int | None]:
        """Return width and height in pixels, `None` for `auto`. Raises `InvalidInput`."""
        if self.size in (None, "auto"):
            return self.width, self.height
        match = _SIZE.fullmatch(self.size or "")
        if not match:
            raise InvalidInput("size must be WIDTHxHEIGHT in pixels, such as 1024x1024, or auto.", field="size")
        width, height = int(match[1]), int(match[2])
        if (self.width or width, self.height or height) != (width, height):
            raise InvalidInput("size and width or height differ; send one of them.", field="size")
        return width, height

    def faults(self, context: DialectContext) -> list[tuple[str, str]]:
        """Return (parameter, sentence) of each value out of its bounds, and of each unknown name."""
        spec = context.find_model(self.model)
        values = {**self.to_request_fields(), "seed": None if self.seed == -1 else self.seed}
        values |= dict.fromkeys(("width", "height", "quality"))
        faults = [*context.limits.faults(values.get), *self._own_faults(context), *self._size_faults(context)]
        if self.true_cfg_scale is not None:
            faults += true_guidance_faults(self.true_cfg_scale, self.extra or {}, spec, context.limits)
        if spec is None:
            faults.append(("model", context.unknown_model(self.model)))
        elif self.scheduler is not None:
            try:
                scheduler_of(spec, self.scheduler, spec.default_steps)
            except InvalidInput as error:
                faults += error.faults
        return faults

    def _steps(self, spec: ModelSpec, context: DialectContext) -> int | None:
        if self.num_inference_steps is not None or self.quality not in _STEP_FACTORS:
            return self.num_inference_steps
        return min(max(1, math.ceil(spec.default_steps * _STEP_FACTORS[self.quality])), context.limits.max_steps)

    def _own_faults(self, context: DialectContext) -> list[tuple[str, str]]:
        faults = []
        if not 1 <= self.count <= context.max_n:
            faults.append(("n", range_sentence("n", 1, context.max_n)))
        if self.count > 1 and self.save_path is not None:
            faults.append(("save_path", "save_path names one image; leave it out, or ask for one."))
        compressed = self.output_compression not in (None, 100)
        if compressed and (self.output_format or Format.PNG) is Format.PNG:
            faults.append(("output_compression", "output_compression must be 100 for png, which loses nothing."))
        if self.partial_images and not self.stream:
            faults.append(("partial_images", "partial_images need stream."))
        return faults

    def _size_faults(self, context: DialectContext) -> list[tuple[str, str]]:
        try:
            width, height = self.pixels()
        except InvalidInput as error:
            return list(error.faults)
        low, high = context.limits.bounds()["width"]
        faults = []
        for name, side in (("width", width), ("height", height)):
            if side is not None and not low <= side <= high:
                by_size = getattr(self, name) is None
                words = f"size: the {name}" if by_size else name
                faults.append(("size" if by_size else name, range_sentence(words, low, high)))
        if len(faults) > 1 and self.size is not None:
            faults = [("size", range_sentence("size: width and height", low, high))]
        if faults or (self.response_format or self.default_format(context)) != "b64_json":
            return faults
        try:
            context.check_size(self.count, width or _DEFAULT_SIDE, height or _DEFAULT_SIDE, "n")
        except InvalidInput as error:
            return list(error.faults)
        return []

    def _shared(self) -> dict[str, Any]:
        return {name: value for name, value in self.to_request_fields().items() if name not in self.own}


class GenerateImagesParams(ImagesParams):
    """Parameters of text to image."""

    def base(self, context: DialectContext) -> GenerationRequest:
        """Return the request of the first image."""
        width, height = self.pixels()
        fields = {**self._shared(), "width": width or _DEFAULT_SIDE, "height": height or _DEFAULT_SIDE}
        return GenerationRequest(task=Task.TEXT_TO_IMAGE, **fields)


def read_images_params(schema: type[P], every: DialectContext) -> Callable[[Request], Awaitable[P]]:
    """Return the dependency that reads query and body of a request as parameters of `schema`; `every` has all models.

    It raises `MalformedRequest`, `UnsupportedMedia`, `InvalidInput`, which names every invalid parameter, and
    `ModelNotFound` if only the model is unknown, or `Forbidden` if the caller may use some models only.
    """

    async def read(request: Request) -> P:
        context = every.for_caller(caller_of(request))
        sent = await read_parameters(request, schema.files, schema.lists, schema.pictures, schema.ignored)
        try:
            size = text_size({name: sent.get(name) for name in schema.pictures})  # base64 is decoded here
            params: P = await run_if_large(size, validated, schema, sent, lambda params: params.faults(context))
        except InvalidInput as error:
            name = sent.get("model")
            if len(error.faults) == 1 and isinstance(name, str) and context.find_model(name) is None:
                raise context.refusal(name, ModelNotFound) from error
            raise
        if params.response_format is not None:
            return params
        return params.model_copy(update={"response_format": params.default_format(context)})

    return read
