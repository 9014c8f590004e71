"""The record inside a picture file: read back from PNG, WebP and JPEG without decoding anything. Pure.

`image_processing.encode` writes it. The file may be anyone's, so nothing in it is believed but its bytes: it is taken
apart here by lengths that are checked, and never handed to a decoder.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from stable_diffusion_server.errors import ServerError
from stable_diffusion_server.parsing import JsonLimits, parse_object

_EXIF_HEAD = b"Exif\0\0"
_EXIF_IFD, _USER_COMMENT = 0x8769, 0x9286
_UNICODE = b"UNICODE\0"
_MOST_BYTES = 1_000_000
_LIMITS = JsonLimits(max_text_bytes=_MOST_BYTES)
# Pieces of a file that are looked at: few files have a thousand.
_MOST_PIECES = 100_000
# Characters of the text AUTOMATIC1111 writes, of which most is the prompt.
_LONGEST_PARAMETERS = 100_000
_ENDINGS = (".webp", ".png", ".jpg", ".jpeg", ".gif", ".avif")


def read_record(file: bytes) -> dict[str, object] | None:
    """The record a picture made here carries, or `None` for a file without one. What it says is to be checked."""
    try:
        text = _text_of(file)
        return parse_object(text.encode(), _LIMITS) if text is not None else None
    except (struct.error, ValueError, IndexError, ServerError):
        return None


def read_parameters_text(file: bytes) -> str:
    """The text AUTOMATIC1111 writes into PNG files, uncompressed; empty where there is none, or a very long one."""
    for kind, data in _png_chunks(file) if file.startswith(b"\x89PNG") else ():
        if kind == b"tEXt" and data.startswith(b"parameters\0"):
            text = data.partition(b"\0")[2].decode("latin-1")
        elif kind == b"iTXt" and data.startswith(b"parameters\0\0"):
            text = data.split(b"\0", 5)[-1].decode("utf-8", "replace")
        else:
            continue
        return text if len(text) <= _LONGEST_PARAMETERS else ""
    return ""


def is_complete_file(head: bytes, tail: bytes, size: int) -> bool:
    """Whether a file of `size` bytes with these first and last dozen is a whole picture, as far as its frame tells."""
    if head.startswith(b"\x89PNG"):
        return tail.endswith(b"IEND\xaeB`\x82")
    if head.startswith(b"\xff\xd8"):
        return tail.endswith(b"\xff\xd9")
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return int.from_bytes(head[4:8], "little") + 8 <= size
    # Not made here, but someone may have put one there.
    return head.startswith(b"GIF8") or head[4:11] == b"ftypavi"


def is_image_object(name: str, content_type: str) -> bool:
    """Whether an object of this name and type is to be a picture."""
    return content_type.startswith("image/") or name.lower().endswith(_ENDINGS)


def _text_of(file: bytes) -> str | None:
    if file.startswith(b"\x89PNG"):
        return _png_text(file)
    if file.startswith(b"RIFF") and file[8:12] == b"WEBP":
        exif = next((data for kind, data in _riff_chunks(file) if kind == b"EXIF"), None)
    elif file.startswith(b"\xff\xd8"):
        exif = next((data for data in _jpeg_application_data(file) if data.startswith(_EXIF_HEAD)), None)
    else:
        exif = None
    return _comment(exif.removeprefix(_EXIF_HEAD)) if exif is not None else None


def _png_text(file: bytes) -> str | None:
    """The text of an iTXt chunk called `record`, which is not compressed (PNG, third edition, 11.3.3.4)."""
    for kind, data in _png_chunks(file):
        if kind == b"iTXt" and data.startswith(b"record\0\0"):
            return data.split(b"\0", 5)[-1].decode()
    return None


def _png_chunks(file: bytes) -> Iterator[tuple[bytes, bytes]]:
    at = 8
    for _ in range(_MOST_PIECES):
        if at + 8 > len(file):
            return
        length, kind = struct.unpack_from(">I4s", file, at)
        yield kind, file[at + 8 : at + 8 + length] if length <= _MOST_BYTES else b""
        at += 12 + length


def _riff_chunks(file: bytes) -> Iterator[tuple[bytes, bytes]]:
    at = 12
    for _ in range(_MOST_PIECES):
        if at + 8 > len(file):
            return
        kind, length = struct.unpack_from("<4sI", file, at)
        yield kind, file[at + 8 : at + 8 + length] if length <= 4 * _MOST_BYTES else b""
        at += 8 + length + length % 2


def _jpeg_application_data(file: bytes) -> Iterator[bytes]:
    """What stands in the APP1 segments before the picture."""
    at = 2
    for _ in range(_MOST_PIECES):
        if at + 4 > len(file):
            return
        lead, marker, length = struct.unpack_from(">BBH", file, at)
        if lead != 0xFF or marker == 0xDA or length < 2:
            return
        if marker == 0xE1:
            yield file[at + 4 : at + 2 + length]
        at += 2 + length


def _comment(tiff: bytes) -> str | None:
    """The UserComment of EXIF (CIPA DC-008), in the UTF-16 this server writes."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return None
    where = _entry(tiff, order, struct.unpack_from(f"{order}I", tiff, 4)[0], _EXIF_IFD)
    found = _entry(tiff, order, where[1], _USER_COMMENT) if where is not None else None
    if found is None:
        return None
    data = tiff[found[1] : found[1] + found[0]]
    return data[len(_UNICODE) :].decode("utf-16-be") if data.startswith(_UNICODE) else None


def _entry(tiff: bytes, order: str, at: int, wanted: int) -> tuple[int, int] | None:
    """Count and value of a tag in the directory at an offset."""
    (entries,) = struct.unpack_from(f"{order}H", tiff, at)
    for number in range(entries):
        tag, _, count, value = struct.unpack_from(f"{order}HHII", tiff, at + 2 + 12 * number)
        if tag == wanted:
            return count, value
    return None
