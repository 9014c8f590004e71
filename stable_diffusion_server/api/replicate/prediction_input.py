"""Parameters of a prediction's `input`, by the names that image models at Replicate have, as generation requests."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from stable_diffusion_server.api.image_sources import ImageSource, OptionalSource, Source
from stable_diffusion_server.api.request_parsing import RawJson
from stable_diffusion_server.api.schemas.params import GenerationParams
from stable_diffusion_server.api.schemas.validation import validated
from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.generation import RequestLimits, able, parse_int
from stable_diffusion_server.pipelines import ModelSpec, scheduler_of
from stable_diffusion_server.types import Fit, Format, GenerationRequest, ImageInput, Task

# Schedulers here by the names that models at Replicate have, closest first.
_SCHEDULERS: Mapping[str, tuple[str, ...]] = {
    "DDIM": ("ddim",),
    "DPMSolverMultistep": ("dpm_2m", "dpm"),
    "HeunDiscrete": ("heun", "euler"),
    "KarrasDPM": ("dpm_2m", "dpm"),
    "K_EULER": ("euler", "flow_euler"),
    "K_EULER_ANCESTRAL": ("euler_a",),
    "LCM": ("lcm",),
    "PNDM": ("pndm", "ddim"),
}
# Values of `refine` where it is a text.
_UNREFINED = "no_refiner"
# Values of `aspect_ratio` that are no ratio: the size of the image, or `width` and `height`.
_NO_RATIO = frozenset({"match_input_image", "custom", "original"})
_STEEPEST, _GRID = 4.0, 16
_DEFAULT_STRENGTH = 0.8
_IGNORED = (
    "disable_safety_checker safety_checker safety_tolerance apply_watermark go_fast prompt_upsampling megapixels "
    "high_noise_frac refine_steps interval replicate_weights output_type"
).split()
_OWN = frozenset(
    "num_outputs output_format output_quality aspect_ratio prompt_strength width height refine".split() + _IGNORED
)
_IGNORED_FIELD = Field(None, description="Accepted and ignored, with a line in `logs`.")


class PredictionInput(GenerationParams):
    """Parameters of `input`: those of this server, and the names that models at Replicate share."""

    numbers: ClassVar[frozenset[str]] = GenerationParams.numbers | {"prompt_strength", "num_outputs", "output_quality"}
    other_names: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("steps", "num_steps"), "num_inference_steps"),
        **dict.fromkeys(("guidance", "cfg", "cfg_scale"), "guidance_scale"),
        **dict.fromkeys(("image_input", "input_images", "reference_images"), "images"),
        **dict.fromkeys(("strength", "denoising_strength"), "prompt_strength"),
        "input_image": "image",
        "sampler": "scheduler",
        "num_images": "num_outputs",
    }

    image: OptionalSource = Field(
        None,
        description="The image to change: an https URL or a data URL. A model that edits by instruction looks at it.",
    )
    images: tuple[Source, ...] = Field((), description="Images that a model which edits by instruction looks at.")
    mask: OptionalSource = Field(None, description="White where `image` is repainted; an https URL or a data URL.")
    prompt_strength: float | None = Field(
        None, ge=0, le=1, description="How much of `image` changes. If omitted 0.8, with a mask 1."
    )
    width: int | None = Field(None, description="Width in pixels.")
    height: int | None = Field(None, description="Height in pixels.")
    aspect_ratio: str | None = Field(
        None, max_length=20, description="Such as `16:9`, in place of width and height, at the model's own area."
    )
    num_outputs: int | None = Field(None, description="1: a prediction draws one image.")
    output_format: Literal["webp", "jpg", "jpeg", "png"] | None = Field(None, description="If omitted webp.")
    output_quality: int | None = Field(None, ge=0, le=100, description="Quality of webp and jpg.")
    disable_safety_checker: Any = _IGNORED_FIELD
    safety_checker: Any = _IGNORED_FIELD
    safety_tolerance: Any = _IGNORED_FIELD
    apply_watermark: Any = _IGNORED_FIELD
    go_fast: Any = _IGNORED_FIELD
    prompt_upsampling: Any = _IGNORED_FIELD
    megapixels: Any = _IGNORED_FIELD
    high_noise_frac: Any = _IGNORED_FIELD
    refine_steps: Any = _IGNORED_FIELD
    interval: Any = _IGNORED_FIELD
    replicate_weights: Any = _IGNORED_FIELD
    output_type: Any = _IGNORED_FIELD

    @field_validator("images", mode="before")
    @classmethod
    def _as_list(cls, value: object) -> object:
        return [value] if isinstance(value, str | Mapping) else value

    @property
    def ignored_names(self) -> tuple[str, ...]:
        """Parameters that were given and have no effect here."""
        return tuple(name for name in _IGNORED if getattr(self, name) is not None)

    def faults(self, limits: RequestLimits, spec: ModelSpec, models: Mapping[str, ModelSpec]) -> list[tuple[str, str]]:
        """Return (parameter, sentence) of each value that is out of its bounds or does not fit the model."""
        values = {**self.to_request_fields(), "seed": None if self.seed == -1 else self.seed}
        faults = limits.faults(values.get)
        if self.num_outputs not in (None, 1):
            faults.append(("num_outputs", "num_outputs must be 1: make a prediction for each image."))
        if self.model is not None:
            faults.append(("model", "model is named by the path, or by version, not in input."))
        if self.mask is not None and self.image is None:
            faults.append(("image", "image is missing: a mask says where an image is repainted."))
        if self.images and Task.EDIT not in spec.tasks:
            faults.append(("images", f"images are for models that edit by instruction; {able(Task.EDIT, models)}."))
        if self.scheduler is not None:
            try:
                scheduler_of(spec, _scheduler(self.scheduler, spec), spec.default_steps)
            except InvalidInput as error:
                faults += error.faults
        try:
            self._size(spec)
        except InvalidInput as error:
            faults += error.faults
        return faults

    def to_request(self, spec: ModelSpec) -> GenerationRequest:
        """Return the request: an edit where the model edits by instruction, else by what images there are."""
        fields = {name: value for name, value in self.to_request_fields().items() if name not in _OWN}
        width, height = self._size(spec)
        fields |= {
            "model": spec.name,
            "width": width,
            "height": height,
            "seed": "random" if self.seed in (None, -1) else self.seed,
            "scheduler": None if self.scheduler is None else _scheduler(self.scheduler, spec),
            "format": {"webp": Format.WEBP, "png": Format.PNG, None: None}.get(self.output_format, Format.JPEG),
            "quality": None if self.output_quality is None else max(1, self.output_quality),
            "refine": self.refine,
            "at_least_one_step": True,
        }
        if self.mask is not None and self.image is not None:
            strength = 1.0 if self.prompt_strength is None else self.prompt_strength
            masked = self.mask.to_input("mask")
            return GenerationRequest(Task.INPAINT, image=self._image(), mask=masked, strength=strength, **fields)
        if (self.image is not None or self.images) and Task.EDIT in spec.tasks and self.prompt_strength is None:
            return GenerationRequest(Task.EDIT, references=self._references(), **fields)
        if self.image is None:
            return GenerationRequest(Task.TEXT_TO_IMAGE, **fields)
        strength = _DEFAULT_STRENGTH if self.prompt_strength is None else self.prompt_strength
        return GenerationRequest(Task.IMAGE_TO_IMAGE, image=self._image(), strength=strength, fit=Fit.CROP, **fields)

    def _image(self) -> ImageInput:
        assert self.image is not None  # noqa: S101  # the callers checked it; narrows the type
        return self.image.to_input("image")

    def _references(self) -> tuple[ImageInput, ...]:
        sources: list[ImageSource] = [*([self.image] if self.image is not None else []), *self.images]
        return tuple(source.to_input(f"images[{number}]") for number, source in enumerate(sources))

    def _size(self, spec: ModelSpec) -> tuple[int | None, int | None]:
        """Return width and height in pixels, `None` for the default. Raises `InvalidInput`."""
        if self.width or self.height or self.aspect_ratio is None or self.aspect_ratio in _NO_RATIO:
            return self.width, self.height
        wide, _, high = self.aspect_ratio.partition(":")
        ratio = (parse_int(wide) or 0) / (parse_int(high) or 1)
        if not 1 / _STEEPEST <= ratio <= _STEEPEST:
            raise InvalidInput("aspect_ratio must be between 1:4 and 4:1, such as 16:9.", field="aspect_ratio")
        width = round(math.sqrt(spec.native_pixels * ratio) / _GRID) * _GRID
        return width, round(math.sqrt(spec.native_pixels / ratio) / _GRID) * _GRID


def read_input(
    sent: Mapping[str, Any], limits: RequestLimits, spec: ModelSpec, models: Mapping[str, ModelSpec]
) -> PredictionInput:
    """Validate an `input` for a model; `models` are those that the caller may use. Slow for images in base64.

    Raises `InvalidInput`, which names every invalid parameter.
    """
    given = {name: RawJson(value) if isinstance(value, str) else value for name, value in sent.items()}
    if isinstance(given.get("refine"), str):
        given["refine"] = given["refine"] != _UNREFINED
    return validated(PredictionInput, given, lambda params: params.faults(limits, spec, models))


def _scheduler(name: str, spec: ModelSpec) -> str:
    """Return the scheduler of a model that a name means, the name itself where it means no other."""
    closest = _SCHEDULERS.get(name, (name,))
    return next((one for one in closest if one in spec.schedulers), closest[0])
