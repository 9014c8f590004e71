"""Pixels to size and back, edges, masks, paste-back, and pixels to bytes with metadata. Pure; knows no files."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from stable_diffusion_server.types import Format

Pixels = NDArray[np.uint8]

ALIGNMENT = 64
# Method 2 of 0..6: about the size of the default 4 at half its time.
_WEBP_METHOD = 2
_LOSSLESS_EFFORT = 20
# Level of grey → level of a mask: 0 up to 32, 255 from 223, straight between.
_MASK_LEVELS = [round(min(max((level - 32) * 255 / 191, 0), 255)) for level in range(256)]
_EXIF_IFD, _USER_COMMENT = 0x8769, 0x9286


@dataclass(frozen=True, slots=True)
class Canvas:
    """The size a model draws at, in pixels; `resampled` when it has to be scaled to the size asked for."""

    width: int
    height: int
    resampled: bool


def plan_canvas(width: int, height: int, native_pixels: int, floor: int) -> Canvas:
    """The canvas for a picture of `width` × `height` pixels.

    Within the model's budget of `native_pixels` (an area) and not under its `floor` (a side): the next multiple of
    64 up, to be cropped. Else the native size that keeps most of itself when cropped to the asked aspect ratio, to be
    resampled.
    """
    aligned_width, aligned_height = _align_up(width), _align_up(height)
    if aligned_width * aligned_height <= native_pixels and min(aligned_width, aligned_height) >= floor:
        return Canvas(aligned_width, aligned_height, resampled=False)
    aspect = width / height
    sides = range(_align_up(floor), max(floor, native_pixels // floor) + 1, ALIGNMENT)
    candidates = [(w, h) for w in sides for h in sides if w * h <= native_pixels]
    # What is left of a canvas after cropping to the asked aspect ratio; among equals, the one cheapest to draw.
    drawn_width, drawn_height = max(
        candidates, key=lambda c: (min(c[0], c[1] * aspect) * min(c[1], c[0] / aspect), -c[0] * c[1])
    )
    return Canvas(drawn_width, drawn_height, resampled=True)


def crop_to_size(pixels: Pixels, width: int, height: int, *, resample: bool) -> Pixels:
    """`pixels` (uint8, height × width × 3) centre-cropped to the asked aspect ratio and exactly `width` × `height`.

    Without `resample` no pixel is changed, only cut away; with it the crop is scaled by Lanczos.
    """
    drawn_height, drawn_width = pixels.shape[:2]
    if not resample:
        left, top = (drawn_width - width) // 2, (drawn_height - height) // 2
        return pixels[top : top + height, left : left + width]
    scale = max(width / drawn_width, height / drawn_height)
    crop_width, crop_height = width / scale, height / scale
    left_edge, top_edge = (drawn_width - crop_width) / 2, (drawn_height - crop_height) / 2
    box = (left_edge, top_edge, left_edge + crop_width, top_edge + crop_height)
    resized = Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS, box=box)
    return np.asarray(resized)


def to_canvas(pixels: Pixels, canvas: Canvas, *, fill: int | None = None) -> Pixels:
    """The whole picture (uint8, height × width [× 3]) in the middle of a canvas, of which `to_size` is the inverse.

    A canvas without resampling takes it pixel for pixel, another one scaled with its aspect ratio kept.
    Around it its own border is drawn out, or `fill` laid. Where the scaled size is no whole number of pixels, it is
    off by less than half a pixel of the canvas.
    """
    height, width = pixels.shape[:2]
    if canvas.resampled:
        scale = min(canvas.width / width, canvas.height / height)
        width, height = max(1, round(width * scale)), max(1, round(height * scale))
        # Lanczos overshoots, which sharpens a picture and puts shadows around a mask.
        how = Image.Resampling.LANCZOS if pixels.ndim == 3 else Image.Resampling.BILINEAR
        pixels = np.asarray(Image.fromarray(pixels).resize((width, height), how))
    left, top = (canvas.width - width) // 2, (canvas.height - height) // 2
    margins = [(top, canvas.height - height - top), (left, canvas.width - width - left), (0, 0)][: pixels.ndim]
    if fill is None:
        return np.pad(pixels, margins, mode="edge")
    return np.pad(pixels, margins, constant_values=fill)


def canny(pixels: Pixels, low: int = 100, high: int = 200) -> Pixels:
    """Edges (Canny 1986) of an RGB picture as uint8, height × width × 3: 255 on an edge, else 0.

    `low` and `high` are the hysteresis thresholds on the L1 norm of the 3 × 3 Sobel gradient, taken in the channel
    where it is largest: red on blue of the same brightness is an edge.
    """
    edges = cv2.Canny(np.ascontiguousarray(pixels), low, high)
    return np.repeat(np.asarray(edges, np.uint8)[..., None], 3, axis=2)


def to_mask(pixels: Pixels, width: int, height: int) -> Pixels:
    """An RGB picture of any size as a mask: uint8, height × width, grey by luma; 255 repaints, 0 keeps.

    Black and white are taken with a margin of an eighth, since a mask that was a JPEG or drawn is never quite either.
    """
    grey = Image.fromarray(pixels).convert("L")
    if grey.size != (width, height):
        grey = grey.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(grey.point(_MASK_LEVELS))


def is_whole_image(mask: Pixels) -> Pixels:
    """The mask with every grey made white: all that is touched at all."""
    return np.where(mask > 0, np.uint8(255), np.uint8(0))


def feather_mask(mask: Pixels, radius: int) -> Pixels:
    """The mask rising over `radius` pixels from its rim inwards (by Euclidean distance); 0 stays 0 everywhere."""
    if radius == 0:
        return mask
    # A mask that is white to the picture's border has no rim there: pixels beyond the border do not count.
    distance = cv2.distanceTransform(is_whole_image(mask), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    return np.rint(mask * np.clip(np.asarray(distance) / (radius + 1), 0, 1)).astype(np.uint8)


def paste_back(drawn: Pixels, image: Pixels, mask: Pixels) -> Pixels:
    """`drawn` over `image` (both uint8, height × width × 3) by `mask` (height × width): 0 keeps the image exactly."""
    result = np.where((mask == 255)[..., None], drawn, image)
    soft = (mask > 0) & (mask < 255)
    weight = mask[soft][:, None].astype(np.uint16)
    result[soft] = (drawn[soft] * weight + image[soft] * (255 - weight) + 127) // 255
    return result


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


def _align_up(side: int) -> int:
    return -(-side // ALIGNMENT) * ALIGNMENT


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
