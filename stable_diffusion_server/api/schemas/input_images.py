"""Reads the input images of native requests: by URL, in a data URL, or as an uploaded file."""

from __future__ import annotations

from collections.abc import Sequence

from stable_diffusion_server.api.base64_images import bytes_of, is_data_url
from stable_diffusion_server.api.schemas.validation import RequestParams
from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.types import ImageInput


def input_images(parameters: RequestParams, *names: str) -> list[ImageInput]:
    """Return the images of those parameters, by URL or as files. Raises `InvalidInput` for both, or for neither."""
    images, faults = [], []
    for name in names:
        by_url, by_file = f"{name}_url", f"{name}_file"
        url, file = getattr(parameters, by_url), getattr(parameters, by_file)
        if (url is None) == (file is None):
            sentence = f"Give {by_url} or {by_file}, and not both."
            faults += [(by_url, sentence), (by_file, sentence)]
        elif file is not None:
            images.append(ImageInput(by_file, data=file.data))
        else:
            images.append(image_at(url, by_url))
    if faults:
        raise InvalidInput.from_faults(faults)
    return images


def image_at(url: str, parameter: str) -> ImageInput:
    """Return the image of a URL, or in a data URL. Raises `InvalidInput` for base64 that is none."""
    return ImageInput(parameter, data=bytes_of(url, parameter)) if is_data_url(url) else ImageInput(parameter, url=url)


def pictures_size(parameters: RequestParams) -> int:
    """Return the characters of all parameters that may hold images in base64."""
    values = [getattr(parameters, name) for name in parameters.pictures]
    return sum(_characters(value) for value in values)


def _characters(value: str | Sequence[str] | None) -> int:
    return len(value) if isinstance(value, str) else sum(map(len, value or ()))
