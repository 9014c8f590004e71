"""Images as base64 text and in parameters: decode uploads and data URLs, encode files and previews."""

from __future__ import annotations

import asyncio
import base64
import binascii
import re
import weakref

from starlette.concurrency import run_in_threadpool

from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.imaging import Pixels, encode_image
from stable_diffusion_server.types import Format, ImageInput

# Maximum characters before the comma of a data URL; every media type is shorter.
_LONGEST_HEAD = 300
_HEAD = re.compile(r"data:[a-z]+/[a-z0-9.+-]+(;[^;]*)*;base64", re.IGNORECASE)
_PREVIEW_QUALITY = {Format.WEBP: 60, Format.PNG: 100, Format.JPEG: 80}


def is_data_url(text: str) -> bool:
    """Return whether an image URL is a data URL, which contains the image."""
    return text[:5].lower() == "data:"


def bytes_of(text: str, field: str) -> bytes:
    """Decode an image in base64, with or without its padding and the prefix of a data URL.

    Raises `InvalidInput` for `field`.
    """
    head, comma, rest = text[:_LONGEST_HEAD].partition(",")
    if comma and _HEAD.fullmatch(head):
        text = rest + text[_LONGEST_HEAD:]
    try:
        data = binascii.a2b_base64(text, strict_mode=True)
    except ValueError:
        # Cleaned only here: most texts are clean, and copying a long one is slow.
        data = _decode_cleaned(text)
    if data:
        return data
    raise InvalidInput(f"{field} is not a picture in base64.", field=field)


def text_of(data: bytes) -> str:
    """Encode bytes in base64."""
    return base64.b64encode(data).decode("ascii")


def _decode_cleaned(text: str) -> bytes:
    """Decode without line breaks, and with the padding that some clients leave out; empty if that does not help."""
    joined = "".join(text.split())
    try:
        return binascii.a2b_base64(joined + "=" * (-len(joined) % 4), strict_mode=True)
    except ValueError:
        return b""


class EncodedPreviews:
    """Encodes each preview once per format, for all clients that follow it, in any dialect.

    Caches a text while its pixels are referenced. For one event loop.
    """

    def __init__(self) -> None:
        self._cache: dict[int, tuple[weakref.ref[Pixels], dict[Format, asyncio.Task[str]]]] = {}
        self.encoded = 0

    async def text(self, pixels: Pixels, file_format: Format) -> str:
        """Return the preview as a file of that format, in base64."""
        key = id(pixels)
        if key not in self._cache:
            # Delete the entry together with the pixels, because Python reuses the id of a deleted object.
            self._cache[key] = weakref.ref(pixels, lambda _: self._cache.pop(key, None)), {}
        encodings = self._cache[key][1]
        if file_format not in encodings:
            self.encoded += 1
            encodings[file_format] = asyncio.create_task(run_in_threadpool(_encode_preview, pixels, file_format))
        return await asyncio.shield(encodings[file_format])


def _encode_preview(pixels: Pixels, file_format: Format) -> str:
    return text_of(encode_image(pixels, file_format, _PREVIEW_QUALITY[file_format], None))


def input_images(parameters: object, *names: str) -> list[ImageInput]:
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
