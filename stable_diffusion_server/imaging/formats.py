"""Image file formats: names, media types, and recognition by the first and last bytes of a file."""

from __future__ import annotations

from collections.abc import Sequence

from stable_diffusion_server.types import Format

# Pillow's format names: accepted by default, and accepted if EXTRA_IMAGE_FORMATS lists them.
DEFAULT_FORMATS = ("PNG", "JPEG", "WEBP")
OPTIONAL_FORMATS = ("AVIF", "BMP", "GIF", "TIFF")
# Number of bytes at the start of a file that identify its format.
SIGNATURE_BYTES = 12

_DISPLAY_NAMES = {"WEBP": "WebP"}
# The only list of magic bytes outside the sandbox worker, which imports nothing: offset and bytes, all of which match.
_SIGNATURES = {
    "PNG": ((0, b"\x89PNG\r\n\x1a\n"),),
    "JPEG": ((0, b"\xff\xd8\xff"),),
    "WEBP": ((0, b"RIFF"), (8, b"WEBP")),
    "GIF": ((0, b"GIF8"),),
    "AVIF": ((4, b"ftyp"), (8, b"avi")),
    "BMP": ((0, b"BM"),),
}
# A TIFF begins with its byte order.
_TIFF = (b"II*\0", b"MM\0*")
# The empty IEND chunk with its CRC, and the EOI marker.
_PNG_END, _JPEG_END = b"IEND\xaeB`\x82", b"\xff\xd9"
_EXTENSIONS = (".webp", ".png", ".jpg", ".jpeg", ".gif", ".avif")


def describe_formats(formats: Sequence[str]) -> str:
    """The format names as part of a sentence, for example "PNG, JPEG or WebP"."""
    *others, last = (_DISPLAY_NAMES.get(name, name) for name in formats)
    return f"{', '.join(others)} or {last}" if others else last


def media_types(formats: Sequence[str]) -> str:
    """The media types of the formats as the value of an Accept header."""
    return ", ".join(f"image/{name.lower()}" for name in formats)


def detect_format(data: bytes | bytearray) -> str | None:
    """Pillow's name for the format of a file that starts with `data`, or `None` if no signature matches."""
    for name, signature in _SIGNATURES.items():
        if all(data.startswith(magic, offset) for offset, magic in signature):
            return name
    return "TIFF" if data[:4] in _TIFF else None


def matches_signature(data: bytes | bytearray, formats: Sequence[str]) -> bool:
    """Whether a file that starts with `data` has one of these formats."""
    return detect_format(data) in formats


def media_type_of(file: bytes) -> str:
    """The media type of a file that this server encoded: PNG, WebP or else JPEG."""
    match detect_format(file):
        case "PNG":
            return Format.PNG.content_type
        case "WEBP":
            return Format.WEBP.content_type
        case _:
            return Format.JPEG.content_type


def is_complete_file(head: bytes, tail: bytes, size: int) -> bool:
    """Whether an image file was not truncated, as far as its first and last bytes show.

    Args:
        head: The first 12 bytes of the file.
        tail: The last 12 bytes of the file.
        size: The size of the file in bytes.
    """
    match detect_format(head):
        case "PNG":
            return tail.endswith(_PNG_END)
        case "JPEG":
            return tail.endswith(_JPEG_END)
        case "WEBP":
            return int.from_bytes(head[4:8], "little") + 8 <= size
        case detected:
            return detected is not None  # the others are not written here; other programs may store them


def is_image_object(key: str, content_type: str) -> bool:
    """Whether a stored object is meant to be an image, by its content type or the extension of its key."""
    return content_type.startswith("image/") or key.lower().endswith(_EXTENSIONS)
