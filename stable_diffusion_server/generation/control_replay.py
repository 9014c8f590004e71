"""Replays of pictures that control images guided: the files of their units, given again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.types import ControlUnit, ImageInput

CONTROL_FILES = "control_file"
_PARTS = ("image", "mask")


def control_names(controls: Sequence[ControlUnit], sources: Mapping[str, object]) -> list[str]:
    """Return the names of the units' own files among the recorded `sources`, in the order of the units."""
    names = [f"controls[{number}].{part}" for number in range(len(controls)) for part in _PARTS]
    return [name for name in names if name in sources]


def with_control_files(
    controls: Sequence[ControlUnit], sources: Mapping[str, object], files: Sequence[bytes]
) -> tuple[ControlUnit, ...]:
    """Return the units with their files, given in the order of `control_names`.

    Raises `InvalidInput` for another number of files. Their content is compared with the record later.
    """
    names = control_names(controls, sources)
    if len(files) != len(names):
        needed = f"the files of {', '.join(names)}, in this order" if names else "none: the picture was made without it"
        raise InvalidInput(f"{CONTROL_FILES} must be {needed}.", field=CONTROL_FILES)
    given = {name: ImageInput(name, data=data) for name, data in zip(names, files, strict=True)}
    return tuple(
        replace(unit, image=given.get(f"controls[{number}].image"), mask=given.get(f"controls[{number}].mask"))
        for number, unit in enumerate(controls)
    )
