"""Options of a request's images: what of them identifies the picture, and checks of the extended size."""

from __future__ import annotations

from collections.abc import Mapping

from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.types import Extension, Fill, GenerationRequest


def image_options_identity(request: GenerationRequest) -> dict[str, object]:
    """Return the options that identify the picture; none at its default, so that older digests are valid."""
    return {
        **({"fill": request.fill} if request.fill is not Fill.ORIGINAL else {}),
        **({"only_masked": request.only_masked} if request.only_masked is not None else {}),
        **({"extend": request.extend} if request.extend is not None else {}),
    }


def extension_of(values: Mapping[str, int]) -> Extension | None:
    """Return the extension that parameters such as `extend_left` ask for; `None` if all of them are 0."""
    extension = Extension(**{name.removeprefix("extend_"): value for name, value in values.items()})
    return extension if any(extension) else None


def extension_fields(extension: Extension | None) -> dict[str, int]:
    """Return an extension by the names of its parameters."""
    return {} if extension is None else {f"extend_{name}": value for name, value in extension._asdict().items()}


def check_extended_size(extension: Extension, width: int, height: int, max_side: int) -> None:
    """Raise `InvalidInput` if an image of `width` × `height` pixels becomes larger than `max_side` by its new sides."""
    sides = (("left", "right", width), ("top", "bottom", height))
    given = extension._asdict()
    faults = []
    for one, other, side in sides:
        if given[one] + given[other] and side + given[one] + given[other] > max_side:
            sentence = f"The image has {side} pixels on this side; extended it must not have more than {max_side}."
            faults += [(f"extend_{name}", sentence) for name in (one, other) if given[name]]
    if faults:
        raise InvalidInput.from_faults(faults)
