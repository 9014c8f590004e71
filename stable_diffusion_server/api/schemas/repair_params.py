"""The parameter `repairs`: parts of a finished image that a detector finds, and that are drawn again."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from stable_diffusion_server.api.schemas.object_lists import read_objects
from stable_diffusion_server.api.schemas.validation import RequestParams
from stable_diffusion_server.generation import (
    MOST_PART_PROMPTS,
    MOST_REPAIRS,
    NAME_MAX,
    REPAIR_BOUNDS,
    TEXT_MAX,
)
from stable_diffusion_server.types import DetailRepair

# Characters of the JSON text in a form or a query.
_MOST_JSON = 100_000
_MAX_PIXELS = 4096


def _bounded(name: str, default: float, description: str) -> Any:
    low, high = REPAIR_BOUNDS[name]
    return Field(default, ge=low, le=high, description=description)


class RepairEntry(BaseModel):
    """One detector and how the parts that it finds are drawn again."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)

    detector: str = Field(min_length=1, max_length=NAME_MAX, description="Name of the detector's file.")
    prompt: str | list[str] | None = Field(
        None,
        max_length=TEXT_MAX,
        description="What is drawn there, for all parts or a list with one for each. If omitted, the request's prompt.",
    )
    negative_prompt: str | list[str] | None = Field(
        None, max_length=TEXT_MAX, description="What is not. If omitted, the request's negative prompt."
    )
    confidence: float = _bounded("confidence", 0.3, "Least score of a part.")
    most: int = _bounded("most", 4, "How many parts are drawn again at most, the surest first.")
    least_area: float = _bounded("least_area", 0.0, "Least share of the image that a part covers.")
    most_area: float = _bounded("most_area", 1.0, "Largest share of the image that a part covers.")
    strength: float = _bounded("strength", 0.4, "How much a part is changed.")
    steps: int | None = Field(None, ge=1, le=1000, description="Denoising steps. If omitted, the request's.")
    padding: int = _bounded("padding", 32, "Margin in pixels around a part that is drawn with it.")
    feather: int = _bounded("feather", 4, "Pixels over which the part fades in.")
    dilation: int = _bounded("dilation", 4, "Pixels that the part grows by, or shrinks.")
    width: int | None = Field(
        None, ge=64, le=_MAX_PIXELS, description="Width that a part is drawn at. If omitted, the model's best."
    )
    height: int | None = Field(None, ge=64, le=_MAX_PIXELS, description="Its height, likewise.")

    @field_validator("prompt", "negative_prompt")
    @classmethod
    def _check_prompts(cls, value: str | list[str] | None) -> str | list[str] | None:
        if isinstance(value, list) and len(value) > MOST_PART_PROMPTS:
            raise ValueError("is a list of more than 16 texts")
        if isinstance(value, list) and any(len(text) > TEXT_MAX for text in value):
            raise ValueError("has a text of more than 32,000 characters")
        return value

    def to_repair(self) -> DetailRepair:
        """Return the repair that this entry describes."""
        values = self.model_dump(exclude={"prompt", "negative_prompt"})
        return DetailRepair(**values, prompts=_texts(self.prompt), negative_prompts=_texts(self.negative_prompt))


class RepairParams(RequestParams):
    """Parts of the finished image that are drawn again."""

    repairs: tuple[RepairEntry, ...] = Field(
        (),
        description=(
            "Parts of the finished image, such as faces, that a detector finds and that are drawn again at full size: "
            "a list of objects, in forms its JSON. docs/detail-repair.md lists their members."
        ),
    )

    @field_validator("repairs", mode="before")
    @classmethod
    def _read_repairs(cls, value: object) -> object:
        return read_objects(value, "repairs", RepairEntry, MOST_REPAIRS, _MOST_JSON) if value else ()


def _texts(given: str | list[str] | None) -> tuple[str, ...]:
    if given is None:
        return ()
    return (given,) if isinstance(given, str) else tuple(given)
