"""Previews as text: each is encoded once for all who follow it, whatever the dialect."""

from __future__ import annotations

import asyncio
import weakref
from functools import partial

from stable_diffusion_server.api.base64_images import text_of
from stable_diffusion_server.imaging import Pixels, encode_image
from stable_diffusion_server.types import Format

_QUALITY = {Format.WEBP: 60, Format.PNG: 100, Format.JPEG: 80}


class EncodedPreviews:
    """Keeps the encoded text of a preview for as long as anyone holds its pixels. Lives on one event loop."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[weakref.ref[Pixels], dict[Format, asyncio.Task[str]]]] = {}
        self.encoded = 0

    async def text(self, pixels: Pixels, file_format: Format) -> str:
        """The preview as a file of that format, in base64."""
        key = id(pixels)
        if key not in self._kept:
            # The identity is another picture's once this one is gone.
            self._kept[key] = weakref.ref(pixels, lambda _: self._kept.pop(key, None)), {}
        encodings = self._kept[key][1]
        if file_format not in encodings:
            self.encoded += 1
            work = partial(_encoded, pixels, file_format)
            encodings[file_format] = asyncio.create_task(asyncio.to_thread(work))
        return await asyncio.shield(encodings[file_format])


def _encoded(pixels: Pixels, file_format: Format) -> str:
    return text_of(encode_image(pixels, file_format, _QUALITY[file_format], None))
