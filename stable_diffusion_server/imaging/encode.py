"""Encodes pixels as PNG, WebP or JPEG with embedded metadata."""

from __future__ import annotations

import io
from collections.abc import Mapping

from PIL import Image

from stable_diffusion_server.imaging.metadata import exif_with_record, png_text
from stable_diffusion_server.imaging.resize import Pixels
from stable_diffusion_server.types import Format

# Method 2 of 0..6: about the file size of the default 4 in half the time.
_WEBP_METHOD = 2
# For lossless WebP `quality` sets the effort; 100 takes several times as long for a few bytes less.
_LOSSLESS_EFFORT = 20
# A JPEG segment has at most 65,535 bytes, two of them for its length. Long prompts exceed that.
_JPEG_EXIF_BYTES = 65_533


def encode_image(
    pixels: Pixels, file_format: Format, quality: int, record: Mapping[str, object] | None, xmp: str = ""
) -> bytes:
    """Encode pixels as an image file.

    Args:
        pixels: uint8, height × width × 3.
        file_format: Format of the file.
        quality: 1..100. WebP is lossless at 100; PNG is always lossless.
        record: Generation parameters to embed as JSON (in EXIF, in PNG as text chunks), or `None`. A JPEG gets only
            `digest` of a record that is too long for it.
        xmp: XMP packet to embed, or an empty string.
    """
    image = Image.fromarray(pixels)
    target = io.BytesIO()
    match file_format:
        case Format.PNG:
            image.save(target, "PNG", compress_level=1, pnginfo=png_text(record, xmp))
        case Format.WEBP:
            lossless = quality == 100
            effort = _LOSSLESS_EFFORT if lossless else quality
            metadata = {"exif": exif_with_record(record), "xmp": xmp.encode()}
            image.save(target, "WEBP", quality=effort, lossless=lossless, method=_WEBP_METHOD, **metadata)
        case Format.JPEG:
            exif = exif_with_record(record)
            if record is not None and len(exif) > _JPEG_EXIF_BYTES:
                exif = exif_with_record({"digest": record.get("digest")})  # the history has the record
            metadata = {"exif": exif} | ({"xmp": xmp.encode()} if xmp else {})
            image.save(target, "JPEG", quality=quality, **metadata)
    return target.getvalue()
