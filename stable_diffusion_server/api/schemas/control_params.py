"""The parameter `controls`: units that guide an image by control images, each with a ControlNet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema, field_validator
from pydantic_core import PydanticCustomError

from stable_diffusion_server.api.image_sources import ImageSource, OptionalSource
from stable_diffusion_server.api.request_parsing import UploadedFile
from stable_diffusion_server.api.schemas.object_lists import read_objects
from stable_diffusion_server.api.schemas.validation import NESTED, RequestParams
from stable_diffusion_server.generation import NAME_MAX
from stable_diffusion_server.types import ControlKind, ControlMode, ControlResize, ControlUnit, ImageInput

# Units that are read; the setting MAX_CONTROLS says how many a request may have.
_MOST_UNITS, _MOST_OPTIONS = 16, 8
# Characters of the JSON text in a form or a query.
_MOST_JSON = 1_000_000
CONTROL_FILES = "control_file"
BINARY = {"type": "string", "format": "binary"}
ListedFile = Annotated[UploadedFile, WithJsonSchema(BINARY)]
_Kind = Annotated[ControlKind, Field(strict=False)]
_Mode = Annotated[ControlMode, Field(strict=False)]
_Resize = Annotated[ControlResize, Field(strict=False)]
_FileNumber = Annotated[int, Field(ge=0, le=_MOST_UNITS * 2 - 1)]


class ControlEntry(BaseModel):
    """One control image and the network that follows it."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, strict=True, arbitrary_types_allowed=True
    )

    kind: _Kind | None = Field(None, description="What the control image shows. If omitted, what `model` follows.")
    model: str | None = Field(
        None, min_length=1, max_length=NAME_MAX, description="Name of the ControlNet. If omitted, the first for `kind`."
    )
    image: OptionalSource = Field(None, description="URL, data URL or base64. If omitted, the request's input image.")
    image_file: _FileNumber | None = Field(
        None, description=f"In multipart, which of the files in `{CONTROL_FILES}`, from 0."
    )
    mask: OptionalSource = Field(None, description="Where the network is followed, in white: URL, data URL or base64.")
    mask_file: _FileNumber | None = Field(None, description=f"In multipart, which of the files in `{CONTROL_FILES}`.")
    weight: float | None = Field(None, ge=0, le=2, description="Strength. If omitted, the network's default.")
    start: float = Field(0.0, ge=0, le=1, description="Share of the steps before it takes effect.")
    end: float = Field(1.0, ge=0, le=1, description="Share of the steps after which it has no effect.")
    preprocess: str | None = Field(
        None,
        max_length=NAME_MAX,
        description="What makes the control image from the picture; `none` takes it as it is. If omitted, by `kind`.",
    )
    options: dict[str, float] | None = Field(
        None, max_length=_MOST_OPTIONS, description="Numbers of the preprocessor, such as `low` and `high` of canny."
    )
    mode: _Mode = Field(ControlMode.BALANCED, description="Which counts more: `prompt`, `control` or both `balanced`.")
    resize: _Resize = Field(ControlResize.CROP, description="How the picture is brought to the size of the result.")
    resolution: int | None = Field(
        None, ge=64, le=2048, description="Shorter side that the preprocessor works at. If omitted, that of the result."
    )

    def to_unit(self, number: int, files: Sequence[UploadedFile]) -> ControlUnit:
        """Return the unit of this place in the list; `files` are those of the form."""
        values = self.model_dump(exclude={"image", "image_file", "mask", "mask_file", "options"})
        name = f"controls[{number}]"
        return ControlUnit(
            **values,
            image=_input(f"{name}.image", self.image, self.image_file, files),
            mask=_input(f"{name}.mask", self.mask, self.mask_file, files),
            options=tuple(sorted((self.options or {}).items())),
        )


class ControlParams(RequestParams):
    """Images that guide the result."""

    files: ClassVar[frozenset[str]] = frozenset({CONTROL_FILES})
    lists: ClassVar[frozenset[str]] = frozenset({CONTROL_FILES})
    pictures: ClassVar[frozenset[str]] = frozenset({"controls"})

    controls: tuple[ControlEntry, ...] = Field(
        (),
        description=(
            "Control images, each with the ControlNet that follows it: a list of objects, in forms its JSON. "
            "docs/controls.md lists their members."
        ),
    )
    control_file: tuple[ListedFile, ...] = Field(
        (), description="Files of `controls`, which name them by `image_file` and `mask_file`, counted from 0."
    )

    @field_validator("controls", mode="before")
    @classmethod
    def _read_controls(cls, value: object) -> object:
        return read_objects(value, "controls", ControlEntry, _MOST_UNITS, _MOST_JSON) if value else ()


def control_units(entries: Sequence[ControlEntry], files: Sequence[UploadedFile]) -> tuple[ControlUnit, ...]:
    """Return the units of a request with their images."""
    return tuple(entry.to_unit(number, files) for number, entry in enumerate(entries))


def check_controls(entries: Sequence[ControlEntry], files: Sequence[UploadedFile]) -> None:
    """Raise `PydanticCustomError` that names each field that does not fit another one, or the files."""
    faults: list[tuple[str, str]] = []
    used: set[int] = set()
    for number, entry in enumerate(entries):
        name = f"controls[{number}]"
        for part, source, file in (("image", entry.image, entry.image_file), ("mask", entry.mask, entry.mask_file)):
            if file is None:
                continue
            used.add(file)
            if source is not None:
                faults.append((f"{name}.{part}", f"Give {name}.{part} or {name}.{part}_file, and not both."))
            if file >= len(files):
                sentence = f"{name}.{part}_file is {file}, and the form has {len(files)} {CONTROL_FILES}."
                faults.append((f"{name}.{part}_file", sentence))
    unused = [number for number in range(len(files)) if number not in used]
    if unused:
        faults.append((CONTROL_FILES, f"{CONTROL_FILES}[{unused[0]}] belongs to no unit in controls."))
    if faults:
        raise PydanticCustomError(NESTED, "controls are at fault", {"faults": faults})


def _input(name: str, source: ImageSource | None, file: int | None, files: Sequence[UploadedFile]) -> ImageInput | None:
    if file is not None:
        return ImageInput(name, data=files[file].data)
    return None if source is None else source.to_input(name)
