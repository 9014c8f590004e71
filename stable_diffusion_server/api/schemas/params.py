"""What may be asked of any picture, whatever the dialect, and how it is read. Knows no policy."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, NoReturn, TypeVar

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError, WithJsonSchema, field_validator, model_validator

from stable_diffusion_server.api.request_parsing import RawJson, UploadedFile, read_parameters
from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.generation import NAME_MAX, TEXT_MAX
from stable_diffusion_server.types import LORA_NAME_PATTERN

_BINARY = {"type": "string", "format": "binary"}
_NUMBERS = frozenset(
    "seed num_inference_steps guidance_scale quality timeout width height strength feather canny_low canny_high "
    "control_scale n output_compression partial_images".split()
)
_TRUTHS = frozenset("overwrite refine canny stream".split())
# Far more than MAX_LORAS adapters need, and few enough to be split before they are counted.
_LORA_TEXT_MAX = 2000
_LORA = re.compile(rf"(?P<name>{LORA_NAME_PATTERN})(:(?P<weight>[+-]?\d{{1,3}}(\.\d{{1,6}})?))?")


File = Annotated[UploadedFile | None, WithJsonSchema(_BINARY)]


class GenerationParams(BaseModel):
    """What may be asked of any picture, by every dialect.

    Bounds are checked by `RequestLimits`, which the settings decide.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, arbitrary_types_allowed=True)

    # Names that may be files of a multipart form, and names that may come more than once.
    files: ClassVar[frozenset[str]] = frozenset()
    lists: ClassVar[frozenset[str]] = frozenset()
    # Names that may hold a picture as text.
    pictures: ClassVar[frozenset[str]] = frozenset()
    numbers: ClassVar[frozenset[str]] = _NUMBERS

    prompt: str = Field(
        max_length=TEXT_MAX, description="What to draw.", examples=["a red circle on a blue background"]
    )
    save_path: str | None = Field(None, description="Name of the picture in the bucket. Without it a name is made.")
    model: str | None = Field(None, max_length=NAME_MAX, description="Name of the model.")
    negative_prompt: str | None = Field(
        None, max_length=TEXT_MAX, description="What not to draw, for models that have a use for it."
    )
    seed: int | Literal["random"] | None = Field(
        None,
        description="Start of the noise; without it one is made from the order, so that it is the same each time.",
    )
    num_inference_steps: int | None = Field(None, description="Denoising steps.")
    guidance_scale: float | None = Field(None, description="How strongly to follow the prompt.")
    scheduler: str | None = Field(None, max_length=NAME_MAX, description="Scheduler by its name in the catalogue.")
    overwrite: bool = Field(False, description="Draw and store even if the name is taken.")
    timeout: float | None = Field(None, description="Seconds to wait for the picture at the most.")
    refine: bool = Field(False, description="A second pass at low strength over what was drawn.")
    batch: Literal["any", "alone"] = Field(
        "any", description="`alone` shares no forward pass with others, so that it can be drawn again bit for bit."
    )
    lora: str | None = Field(
        None,
        max_length=_LORA_TEXT_MAX,
        description="Adapters to draw with, `name` or `name:weight`, separated by commas.",
        examples=["pastel:0.8"],
    )

    @field_validator("lora")
    @classmethod
    def _adapters_with_weights(cls, value: str | None) -> str | None:
        if value is not None and not all(_LORA.fullmatch(part.strip()) for part in value.split(",")):
            raise ValueError("is not a name or name:weight")
        return value

    def to_request_fields(self) -> dict[str, Any]:
        """The parameters as an order holds them, without the pictures."""
        pictures = {"image_url", "image_file", "mask_url", "mask_file", "image", "mask"}
        matches = [_LORA.fullmatch(part.strip()) for part in self.lora.split(",")] if self.lora is not None else []
        loras = tuple((match["name"], float(match["weight"] or 1)) for match in matches if match)
        words = self.model_dump(exclude={"lora", "batch", *pictures})
        return {**words, "loras": loras, "alone": self.batch == "alone"}

    @model_validator(mode="before")
    @classmethod
    def _no_other_types(cls, data: Any) -> Any:
        """Refuse `true` where a number belongs, which Python would take for 1, and in JSON texts and numbers alike."""
        for name, value in data.items() if isinstance(data, dict) else ():
            text = isinstance(value, RawJson) and value != "random"
            if name in cls.numbers and (isinstance(value, bool) or text):
                raise InvalidInput(f"{name} must be a number.", field=name)
            if name in _TRUTHS and (isinstance(value, RawJson | float) or type(value) is int):
                raise InvalidInput(f"{name} must be true or false.", field=name)
        return data


A = TypeVar("A", bound=GenerationParams)
M = TypeVar("M", bound=BaseModel)


async def read_as(schema: type[A], request: Request) -> A:
    """A request's query and body (form, multipart or JSON) as parameters.

    Raises `MalformedRequest`, `UnsupportedMedia`, and `InvalidInput`, which names every refused parameter.
    """
    return validated(schema, await read_parameters(request, schema.files, schema.lists, schema.pictures))


def validated(schema: type[M], parameters: Mapping[str, Any]) -> M:
    """Parameters as a schema has them. Raises `InvalidInput`, which names every refused one."""
    try:
        return schema.model_validate(parameters)
    except ValidationError as error:
        raise_invalid(error)


def raise_invalid(error: ValidationError) -> NoReturn:
    """Turn pydantic's findings into one `InvalidInput`. Values are not repeated: they may be long, or secret."""
    faults: dict[str, str] = {}
    for fault in error.errors(include_url=False, include_input=False):
        name = str(fault["loc"][0])
        faults.setdefault(name[:100], _sentence(name, fault["type"], fault["msg"]))
    raise InvalidInput.from_faults(list(faults.items())) from error


def _sentence(name: str, kind: str, message: str) -> str:
    if kind == "extra_forbidden":
        return f"{name[:100]} is not a parameter here."
    if kind == "missing":
        return f"{name} is missing."
    if name.endswith("_file"):
        return f"{name} must be sent as a file of a multipart form."
    message = message.removeprefix("Value error, ")
    return f"{name}: {message[0].lower()}{message[1:]}."
