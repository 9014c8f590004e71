"""Request parameters of every dialect and of the native routes, and the dependencies that read them."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from fastapi import Request
from pydantic import Field, WithJsonSchema, field_validator, model_validator

from stable_diffusion_server.api.base64_images import image_at, input_images
from stable_diffusion_server.api.concurrency import run_if_large, text_size
from stable_diffusion_server.api.dependencies import caller_of, scope_to_caller
from stable_diffusion_server.api.request_parsing import RawJson, UploadedFile, read_parameters, read_query
from stable_diffusion_server.api.schemas.control_params import (
    BINARY,
    CONTROL_FILES,
    ListedFile,
    check_controls,
    control_units,
)
from stable_diffusion_server.api.schemas.extra_parameters import read_extra
from stable_diffusion_server.api.schemas.hires_params import HiresParams
from stable_diffusion_server.api.schemas.image_prompt_params import (
    IMAGE_PROMPT_FILES,
    ImagePromptParams,
    check_image_prompts,
)
from stable_diffusion_server.api.schemas.prompt_params import PromptParams
from stable_diffusion_server.api.schemas.repair_params import RepairParams
from stable_diffusion_server.api.schemas.sampling_params import SamplingParams
from stable_diffusion_server.api.schemas.validation import FaultsOf, RequestedGeneration, RequestParams, validated
from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.generation import NAME_MAX, RequestLimits
from stable_diffusion_server.parsing import canonical_lora_parts
from stable_diffusion_server.pipelines import SAMPLING_OPTIONS
from stable_diffusion_server.types import LORA_NAME_PATTERN, Format, GenerationRequest, ImageInput, Task, Tiling

_NUMBERS = frozenset(
    "seed num_inference_steps guidance_scale quality timeout width height strength feather canny_low canny_high "
    "control_scale n output_compression partial_images clip_skip eta s_churn s_tmin s_tmax s_noise "
    "guidance_rescale subseed subseed_strength solver_order shift hires_scale hires_width hires_height hires_steps "
    "hires_strength hires_guidance".split()
)
_BOOLEANS = frozenset("overwrite refine canny stream zero_snr wildcards".split())
# Maximum characters of `lora`: far more than MAX_LORAS entries need, and short enough to split before counting.
_LORA_TEXT_MAX = 2000
_LORA = re.compile(
    rf"(?P<name>{LORA_NAME_PATTERN})(:(?P<weight>[+-]?[0-9]{{1,3}}(\.[0-9]{{1,6}})?))?(:(?P<parts>(te|lbw)=[^,]*))?"
)
# Maximum bytes of a query string whose parsed request is cached.
_CACHED_QUERY_MAX = 1024

File = Annotated[UploadedFile | None, WithJsonSchema(BINARY)]
P = TypeVar("P", bound=RequestParams)


class GenerationParams(RepairParams, HiresParams, SamplingParams, PromptParams, ImagePromptParams):
    """Parameters that every dialect takes. `RequestLimits` checks their bounds, which are settings."""

    lists: ClassVar[frozenset[str]] = PromptParams.lists | ImagePromptParams.lists
    numbers: ClassVar[frozenset[str]] = _NUMBERS

    save_path: str | None = Field(
        None, description="Object key of the image. If omitted, the key is derived from the request."
    )
    model: str | None = Field(None, max_length=NAME_MAX, description="Name of the model.")
    seed: int | Literal["random"] | None = Field(
        None,
        description="Seed of the noise. If omitted, derived from the request, so equal requests get equal images.",
    )
    num_inference_steps: int | None = Field(None, description="Denoising steps.")
    guidance_scale: float | None = Field(None, description="How strongly to follow the prompt.")
    scheduler: str | None = Field(None, max_length=NAME_MAX, description="Scheduler by its name.")
    overwrite: bool = Field(False, description="Generate and store even if the key exists.")
    timeout: float | None = Field(None, description="Maximum seconds to wait for the image.")
    refine: bool = Field(False, description="Run a second pass at low strength over the image.")
    batch: Literal["any", "alone"] = Field(
        "any",
        description="`alone` shares no forward pass with other requests, so the image is reproducible bit for bit.",
    )
    lora: str | None = Field(
        None,
        max_length=_LORA_TEXT_MAX,
        description=(
            "LoRAs to apply, `name` or `name:weight`, separated by commas; `:te=0.5` after that is the weight in the "
            "text encoders, `:lbw=1/0/0.5` multiplies the weight block by block."
        ),
        examples=["pastel:0.8"],
    )
    clip_skip: int | None = Field(
        None, description="Last layers of CLIP to leave out, more than usual. For SD 1.5 and SDXL."
    )
    tiling: Tiling | None = Field(
        None, description="Borders that meet when the image is repeated. For SD 1.5 and SDXL, sides multiples of 64."
    )
    extra: dict[str, bool | int | float | str] | None = Field(
        None,
        description=(
            "Parameters that only this model has, by name: an object, in forms its JSON. docs/models.md lists them."
        ),
    )

    @field_validator("lora")
    @classmethod
    def _check_loras(cls, value: str | None) -> str | None:
        if value is not None and not all(_LORA.fullmatch(part.strip()) for part in value.split(",")):
            raise ValueError("is not a name, name:weight or name:weight:te=weight:lbw=weights")
        return value

    @field_validator("extra", mode="before")
    @classmethod
    def _read_extra(cls, value: object) -> object:
        return read_extra(value)

    @model_validator(mode="after")
    def _check_files(self) -> Self:
        if self.controls or self.control_file:
            check_controls(self.controls, self.control_file)
        if self.image_prompts or self.image_prompt_file:
            check_image_prompts(self.image_prompts, len(self.image_prompt_file))
        return self

    def to_request_fields(self) -> dict[str, Any]:
        """Return the fields of a `GenerationRequest`, without the images except those that guide it."""
        images = {
            "controls",
            "repairs",
            CONTROL_FILES,
            "image_prompts",
            IMAGE_PROMPT_FILES,
            "image_url",
            "image_file",
            "mask_url",
            "mask_file",
            "image",
            "images",
            "mask",
        }
        matches = [_LORA.fullmatch(part.strip()) for part in self.lora.split(",")] if self.lora is not None else []
        loras = tuple((match["name"], float(match["weight"] or 1)) for match in matches if match)
        parts = {match["name"]: canonical_lora_parts(match["parts"]) for match in matches if match and match["parts"]}
        values = self.model_dump(exclude={"lora", "batch", *images})
        values["extra"] = tuple((self.extra or {}).items())
        sampling = {name: values.pop(name) for name in SAMPLING_OPTIONS}
        values["sampling"] = tuple((name, value) for name, value in sampling.items() if value is not None)
        # A default strength must not refuse a request of few steps.
        chosen = "strength" in self.model_fields_set and getattr(self, "strength", None) is not None
        if self.controls:
            values["controls"] = control_units(self.controls, self.control_file)
        if self.image_prompts:
            values["image_prompts"] = self.prompting_images
        values |= {"loras": loras, "lora_parts": tuple((name, text) for name, text in parts.items() if text)}
        return {
            **values,
            "repairs": tuple(entry.to_repair() for entry in self.repairs),
            "alone": self.batch == "alone",
            "at_least_one_step": not chosen,
        }

    @classmethod
    def type_faults(cls, parameters: Mapping[str, Any]) -> list[tuple[str, str]]:
        """Return the booleans for numbers, and in JSON the texts for numbers and booleans."""
        return type_faults_of(parameters, cls.numbers, _BOOLEANS)


def type_faults_of(
    parameters: Mapping[str, Any], numbers: Collection[str], booleans: Collection[str]
) -> list[tuple[str, str]]:
    """Return the booleans for numbers (`True == 1` in Python), and in JSON the texts for numbers and booleans."""
    faults = []
    for name, value in parameters.items():
        text = isinstance(value, RawJson) and value != "random"
        if name in numbers and (isinstance(value, bool) or text):
            faults.append((name, f"{name} must be a number."))
        if name in booleans and (isinstance(value, RawJson | float) or type(value) is int):
            faults.append((name, f"{name} must be true or false."))
    return faults


class NativeParams(GenerationParams, RequestedGeneration):
    """Parameters that all native routes take."""

    format: Format | None = Field(
        None, description="File format. If omitted, the extension of `save_path` decides, otherwise webp."
    )
    quality: int | None = Field(None, description="1 to 100; webp at 100 is lossless.")
    webhook_url: str | None = Field(
        None, description="URL that is notified when the job ends; only with `Prefer: respond-async`."
    )


class TextToImageParams(NativeParams):
    """Parameters of text to image. The defaults are the original server's."""

    width: int = Field(1024, description="Width of the image in pixels.")
    height: int = Field(1024, description="Height of the image in pixels.")

    def to_request(self) -> GenerationRequest:
        """Return the request these parameters describe."""
        return GenerationRequest(task=Task.TEXT_TO_IMAGE, **self.to_request_fields())


class ImageToImageParams(NativeParams):
    """Parameters of image to image. The defaults are the original server's."""

    files: ClassVar[frozenset[str]] = NativeParams.files | {"image_file"}
    pictures: ClassVar[frozenset[str]] = NativeParams.pictures | {"image_url"}

    image_url: str | None = Field(
        None, description="URL of the input image, or the image in a data URL; or send `image_file`."
    )
    image_file: File = Field(None, description="The input image, a PNG, JPEG or WebP file.")
    strength: float = Field(0.6, description="How much the image is changed, 0 to 1.")
    canny: bool | None = Field(False, description="Keep the edges of the image, with a ControlNet.")
    canny_low: int = Field(100, description="Lower Canny threshold: pixels above it that touch an edge belong to it.")
    canny_high: int = Field(200, description="Upper Canny threshold: pixels above it are edges.")
    control_scale: float | None = Field(
        None, description="How strongly to keep the edges. If omitted, the default of the model's ControlNet."
    )

    def to_request(self) -> GenerationRequest:
        """Return the request these parameters describe. Raises `InvalidInput` unless there is exactly one image."""
        (image,) = input_images(self, "image")
        return GenerationRequest(task=Task.IMAGE_TO_IMAGE, image=image, **self.to_request_fields())


class ImageToImageUploadParams(ImageToImageParams):
    """Parameters of image to image for an uploaded file, whose object key starts with a digest of its content."""

    canny: bool | None = Field(
        None, description="Keep the edges of the image. If omitted, where the model has a ControlNet."
    )

    def to_request(self) -> GenerationRequest:
        """Return the request these parameters describe. Raises `InvalidInput` unless there is exactly one image."""
        return replace(super().to_request(), named_by_content=True)


class EditParams(NativeParams):
    """Parameters of an edit by instruction, for models that look at reference images."""

    files: ClassVar[frozenset[str]] = NativeParams.files | {"image_file"}
    lists: ClassVar[frozenset[str]] = NativeParams.lists | {"image_file", "image_url"}
    pictures: ClassVar[frozenset[str]] = NativeParams.pictures | {"image_url"}

    image_url: tuple[str, ...] = Field(
        (), description="URLs of the images, in the order in which the prompt counts them, or data URLs."
    )
    image_file: tuple[ListedFile, ...] = Field((), description="The images as PNG, JPEG or WebP files, in order.")
    width: int | None = Field(None, description="Width in pixels. If omitted, that of the first image.")
    height: int | None = Field(None, description="Height in pixels. If omitted, that of the first image.")

    def to_request(self) -> GenerationRequest:
        """Return the request these parameters describe. Raises `InvalidInput` for no image, and for files and URLs."""
        if bool(self.image_url) == bool(self.image_file):
            sentence = "Give image_url or image_file, once for each image, and not both."
            raise InvalidInput.from_faults([("image_url", sentence), ("image_file", sentence)])
        files = [ImageInput(f"image_file[{number}]", data=file.data) for number, file in enumerate(self.image_file)]
        urls = [image_at(url, f"image_url[{number}]") for number, url in enumerate(self.image_url)]
        return GenerationRequest(task=Task.EDIT, references=(*files, *urls), **self.to_request_fields())


def params_from_request(schema: type[P], faults_of: FaultsOf[P] | None = None) -> Callable[[Request], Awaitable[P]]:
    """Return the dependency that reads query and body (form, multipart or JSON) as parameters of `schema`.

    It raises `MalformedRequest`, `UnsupportedMedia`, and `InvalidInput`, which names every invalid parameter.
    """

    async def read(request: Request) -> P:
        sent = await read_parameters(request, schema.files, schema.lists, schema.pictures, schema.ignored)
        size = text_size({name: sent.get(name) for name in schema.pictures})  # base64 in `controls` is decoded here
        return await run_if_large(size, validated, schema, sent, faults_of)

    return read


def generation_from_request(
    schema: type[RequestedGeneration], limits: RequestLimits
) -> Callable[[Request], Awaitable[GenerationRequest]]:
    """Return the dependency that reads a `GenerationRequest` from query and body by the parameters of `schema`.

    It raises the errors of `params_from_request`, and `Forbidden` for an object key the caller must not write.
    """

    def faults_of(params: RequestedGeneration) -> Sequence[tuple[str, str]]:
        return limits.faults(params.to_request_fields().get)

    read_params = params_from_request(schema, faults_of)

    @lru_cache(1024)  # clients repeat queries, and parsing is pure
    def parse_query(query_string: bytes) -> GenerationRequest:
        return validated(schema, read_query(query_string, schema.lists), faults_of).to_request()

    async def read(request: Request) -> GenerationRequest:
        query = request.scope["query_string"]
        if request.method == "GET" and len(query) <= _CACHED_QUERY_MAX:
            return scope_to_caller(caller_of(request), parse_query(query))
        params = await read_params(request)
        size = text_size({name: getattr(params, name) for name in schema.pictures})
        return scope_to_caller(caller_of(request), await run_if_large(size, params.to_request))

    return read
