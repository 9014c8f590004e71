"""The record inside a picture file: read back from PNG, WebP and JPEG without decoding anything. Pure.

`image_processing.encode` writes it. The file may be anyone's, so nothing in it is believed but its bytes: it is taken
apart here by lengths that are checked, and never handed to a decoder.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator

_EXIF_HEAD = b"Exif\0\0"
_EXIF_IFD, _USER_COMMENT = 0x8769, 0x9286
_UNICODE = b"UNICODE\0"
_MOST_BYTES = 1_000_000


def read_record(file: bytes) -> dict[str, object] | None:
    """The record a picture made here carries, or `None` for a file without one. What it says is to be checked."""
    try:
        text = _text_of(file)
        found = json.loads(text) if text is not None and len(text) <= _MOST_BYTES else None
    except (struct.error, ValueError, IndexError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def is_whole(head: bytes, tail: bytes, size: int) -> bool:
    """Whether a file of `size` bytes with these first and last dozen is a whole picture, as far as its frame tells."""
    if head.startswith(b"\x89PNG"):
        return tail.endswith(b"IEND\xaeB`\x82")
    if head.startswith(b"\xff\xd8"):
        return tail.endswith(b"\xff\xd9")
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return int.from_bytes(head[4:8], "little") + 8 <= size
    return False


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
    at = 8
    while at + 8 <= len(file):
        length, kind = struct.unpack_from(">I4s", file, at)
        data = file[at + 8 : at + 8 + length]
        if kind == b"iTXt" and data.startswith(b"record\0\0"):
            return data.split(b"\0", 5)[-1].decode()
        at += 12 + length
    return None


def _riff_chunks(file: bytes) -> Iterator[tuple[bytes, bytes]]:
    at = 12
    while at + 8 <= len(file):
        kind, length = struct.unpack_from("<4sI", file, at)
        yield kind, file[at + 8 : at + 8 + length]
        at += 8 + length + length % 2


def _jpeg_application_data(file: bytes) -> Iterator[bytes]:
    """What stands in the APP1 segments before the picture."""
    at = 2
    while at + 4 <= len(file):
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
