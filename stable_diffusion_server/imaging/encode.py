"""Encodes pixels as PNG, WebP or JPEG with metadata."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from stable_diffusion_server.imaging.canvas import Pixels
from stable_diffusion_server.types import Format

# Method 2 of 0..6: about the size of the default 4 at half its time.
_WEBP_METHOD = 2


_LOSSLESS_EFFORT = 20
# EXIF tags of the Exif IFD pointer and of UserComment.
_EXIF_IFD, _USER_COMMENT = 0x8769, 0x9286


def encode_image(
    pixels: Pixels, file_format: Format, quality: int, record: Mapping[str, object] | None, xmp: str = ""
) -> bytes:
    """The picture as a file of `file_format`, with `record` inside it (JSON in EXIF; text chunks in PNG) when given.

    `quality` is 1..100; WebP at 100 is lossless, PNG always is. `xmp` is an XMP packet to embed, empty for none.
    """
    image = Image.fromarray(pixels)
    target = io.BytesIO()
    match file_format:
        case Format.PNG:
            image.save(target, "PNG", compress_level=1, pnginfo=_png_text(record, xmp))
        case Format.WEBP:
            lossless = quality == 100
            # Of a lossless file `quality` is the effort: the most costs a multiple of the time for a few bytes less.
            effort = _LOSSLESS_EFFORT if lossless else quality
            inside = {"exif": _exif(record), "xmp": xmp.encode()}
            image.save(target, "WEBP", quality=effort, lossless=lossless, method=_WEBP_METHOD, **inside)
        case Format.JPEG:
            image.save(target, "JPEG", quality=quality, exif=_exif(record), **({"xmp": xmp.encode()} if xmp else {}))
    return target.getvalue()


def media_type_of(file: bytes) -> str:
    """The media type of a file this server stores, by its first bytes."""
    if file.startswith(b"\x89PNG"):
        return Format.PNG.content_type
    return Format.WEBP.content_type if file.startswith(b"RIFF") else Format.JPEG.content_type


def parameters_text(record: Mapping[str, object]) -> str:
    """The record in the text form AUTOMATIC1111 writes and its users' tools read."""
    lines = [str(record.get("prompt", ""))]
    if record.get("negative_prompt"):
        lines.append(f"Negative prompt: {record['negative_prompt']}")
    labels = {
        "num_inference_steps": "Steps",
        "scheduler": "Sampler",
        "guidance_scale": "CFG scale",
        "seed": "Seed",
        "model": "Model",
        "revision": "Model hash",
    }
    facts = [f"{label}: {record[name]}" for name, label in labels.items() if name in record]
    if "width" in record and "height" in record:
        facts.append(f"Size: {record['width']}x{record['height']}")
    lines.append(", ".join(facts))
    return "\n".join(lines)


def _png_text(record: Mapping[str, object] | None, xmp: str) -> PngInfo:
    text = PngInfo()
    # iTXt, since tEXt is Latin-1 and prompts are not.
    if xmp:
        text.add_itxt("XML:com.adobe.xmp", xmp)
    if record is not None:
        text.add_itxt("parameters", parameters_text(record))
        text.add_itxt("record", json.dumps(record, ensure_ascii=False))
    return text


def _exif(record: Mapping[str, object] | None) -> bytes:
    """EXIF with the record as a Unicode UserComment (CIPA DC-008, tag 0x9286), empty without a record."""
    if record is None:
        return b""
    exif = Image.Exif()
    comment = b"UNICODE\0" + json.dumps(record, ensure_ascii=False).encode("utf-16-be")
    exif.get_ifd(_EXIF_IFD)[_USER_COMMENT] = comment
    return exif.tobytes()
