"""The parameter `image_prompts`: images that are read as a prompt is, each by an IP-Adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar

from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic_core import PydanticCustomError

from stable_diffusion_server.api.image_sources import OptionalSource
from stable_diffusion_server.api.request_parsing import UploadedFile
from stable_diffusion_server.api.schemas.control_params import ControlParams, ListedFile
from stable_diffusion_server.api.schemas.object_lists import read_objects
from stable_diffusion_server.api.schemas.validation import NESTED
from stable_diffusion_server.generation import NAME_MAX
from stable_diffusion_server.types import ImageInput, ImagePrompt

# Image prompts that are read; the setting MAX_IMAGE_PROMPTS says how many a request may have.
_MOST = 16
# Characters of the JSON text in a form or a query.
_MOST_JSON = 1_000_000
IMAGE_PROMPT_FILES = "image_prompt_file"
_FileNumber = Annotated[int, Field(ge=0, le=_MOST - 1)]


class ImagePromptEntry(BaseModel):
    """One image prompt."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, strict=True, arbitrary_types_allowed=True
    )

    image: OptionalSource = Field(None, description="The picture: URL, data URL or base64.")
    image_file: _FileNumber | None = Field(
        None, description=f"In multipart, which of the files in `{IMAGE_PROMPT_FILES}`, from 0."
    )
    model: str | None = Field(
        None, min_length=1, max_length=NAME_MAX, description="Name of the adapter. If omitted, the model's first."
    )
    weight: float = Field(1.0, ge=0, le=2, description="How much it counts.")
    start: float = Field(0.0, ge=0, le=1, description="Share of the steps before it takes effect.")
    end: float = Field(1.0, ge=0, le=1, description="Share of the steps after which it has no effect.")

    def to_prompt(self, number: int, files: Sequence[UploadedFile]) -> ImagePrompt:
        """Return the image prompt of this place in the list; `files` are those of the form."""
        name = f"image_prompts[{number}].image"
        image = ImageInput(name) if self.image is None else self.image.to_input(name)
        if self.image_file is not None:
            image = ImageInput(name, data=files[self.image_file].data)
        return ImagePrompt(image, self.model, self.weight, self.start, self.end)


class ImagePromptParams(ControlParams):
    """Images that are read as a prompt is."""

    files: ClassVar[frozenset[str]] = ControlParams.files | {IMAGE_PROMPT_FILES}
    lists: ClassVar[frozenset[str]] = ControlParams.lists | {IMAGE_PROMPT_FILES}
    pictures: ClassVar[frozenset[str]] = ControlParams.pictures | {"image_prompts"}

    image_prompts: tuple[ImagePromptEntry, ...] = Field(
        (),
        description=(
            "Images that are read as a prompt is, each by an IP-Adapter or FLUX.1 Redux: a list of objects, in forms "
            "its JSON. docs/image-prompts.md lists their members."
        ),
    )
    image_prompt_file: tuple[ListedFile, ...] = Field(
        (), description="Files of `image_prompts`, which name them by `image_file`, counted from 0."
    )

    @field_validator("image_prompts", mode="before")
    @classmethod
    def _read_image_prompts(cls, value: object) -> object:
        return read_objects(value, "image_prompts", ImagePromptEntry, _MOST, _MOST_JSON) if value else ()

    @property
    def prompting_images(self) -> tuple[ImagePrompt, ...]:
        """The image prompts with their images."""
        return tuple(entry.to_prompt(number, self.image_prompt_file) for number, entry in enumerate(self.image_prompts))


def check_image_prompts(entries: Sequence[ImagePromptEntry], files: int) -> None:
    """Raise `PydanticCustomError` that names each entry without one image, and a file that none names."""
    faults: list[tuple[str, str]] = []
    for number, entry in enumerate(entries):
        name = f"image_prompts[{number}]"
        if (entry.image is None) == (entry.image_file is None):
            faults.append((f"{name}.image", f"Give {name}.image or {name}.image_file, one of them."))
        if entry.image_file is not None and entry.image_file >= files:
            sentence = f"{name}.image_file is {entry.image_file}, and the form has {files} {IMAGE_PROMPT_FILES}."
            faults.append((f"{name}.image_file", sentence))
    unused = sorted({*range(files)} - {entry.image_file for entry in entries})
    if unused:
        sentence = f"{IMAGE_PROMPT_FILES}[{unused[0]}] belongs to no image prompt."
        faults.append((IMAGE_PROMPT_FILES, sentence))
    if faults:
        raise PydanticCustomError(NESTED, "image prompts are at fault", {"faults": faults})
