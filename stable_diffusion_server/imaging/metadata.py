"""Writes metadata into image files, and reads it back from PNG, WebP and JPEG without a decoder.

Two kinds are embedded: the generation record (JSON in EXIF, in PNG as text chunks), and an XMP packet that marks the
image as AI-generated. The readers accept files from anyone, so they check every length and never call a decoder.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from enum import StrEnum

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from stable_diffusion_server.errors import ServerError
from stable_diffusion_server.imaging.formats import detect_format
from stable_diffusion_server.imaging.infotext import parameters_text
from stable_diffusion_server.parsing import JsonLimits, parse_object

_EXIF_PREFIX = b"Exif\0\0"
# Tags of the Exif IFD pointer and of UserComment (CIPA DC-008).
_EXIF_IFD, _USER_COMMENT = 0x8769, 0x9286
_UNICODE_PREFIX = b"UNICODE\0"
_MAX_RECORD_BYTES = 1_000_000
_LIMITS = JsonLimits(max_text_bytes=_MAX_RECORD_BYTES)
# Chunks or segments that are read per file; ordinary files have fewer than a thousand.
_MAX_CHUNKS = 100_000
# Characters of AUTOMATIC1111's parameters text, most of which is the prompt.
_MAX_PARAMETERS = 100_000

_VOCABULARY = "http://cv.iptc.org/newscodes/digitalsourcetype/"
# ISO 16684-1 (XMP) with the property "Digital Source Type" of the IPTC Photo Metadata Standard.
_XMP_PACKET = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/">'
    "<Iptc4xmpExt:DigitalSourceType>{uri}</Iptc4xmpExt:DigitalSourceType>"
    '</rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end="r"?>'
)


class DigitalSourceType(StrEnum):
    """How an image was made, as a term of IPTC's NewsCodes."""

    GENERATED = "trainedAlgorithmicMedia"
    EDITED = "compositeWithTrainedAlgorithmicMedia"

    @property
    def uri(self) -> str:
        """The URI of the term in IPTC's vocabulary, which is the value that XMP holds."""
        return _VOCABULARY + self.value


def source_type_of(*, has_input_image: bool) -> DigitalSourceType:
    """The source type of an image made from a prompt only, or from an image that the caller sent."""
    return DigitalSourceType.EDITED if has_input_image else DigitalSourceType.GENERATED


def xmp_packet(source_type: DigitalSourceType) -> str:
    """The XMP packet for an image of this source type, about 450 characters."""
    return _XMP_PACKET.format(uri=source_type.uri)


def png_text(record: Mapping[str, object] | None, xmp: str) -> PngInfo:
    """PNG text chunks with the record, if there is one, and with the XMP packet, if it is not empty."""
    text = PngInfo()
    # iTXt, because tEXt is Latin-1 and prompts are Unicode.
    if xmp:
        text.add_itxt("XML:com.adobe.xmp", xmp)
    if record is not None:
        text.add_itxt("parameters", parameters_text(record))
        text.add_itxt("record", json.dumps(record, ensure_ascii=False))
    return text


def exif_with_record(record: Mapping[str, object] | None) -> bytes:
    """EXIF with the record as a Unicode UserComment; empty without a record."""
    if record is None:
        return b""
    exif = Image.Exif()
    comment = _UNICODE_PREFIX + json.dumps(record, ensure_ascii=False).encode("utf-16-be")
    exif.get_ifd(_EXIF_IFD)[_USER_COMMENT] = comment
    return exif.tobytes()


def read_record(file: bytes) -> dict[str, object] | None:
    """The generation record embedded in a file, not validated; `None` if there is none or it is unreadable."""
    try:
        text = _read_record_text(file)
        return parse_object(text.encode(), _LIMITS) if text is not None else None
    except (struct.error, ValueError, IndexError, ServerError):
        return None


def read_parameters_text(file: bytes) -> str:
    """AUTOMATIC1111's uncompressed parameters text from a PNG file; empty if there is none or it is too long."""
    for kind, data in _png_chunks(file) if detect_format(file) == "PNG" else ():
        if kind == b"tEXt" and data.startswith(b"parameters\0"):
            text = data.partition(b"\0")[2].decode("latin-1")
        elif kind == b"iTXt" and data.startswith(b"parameters\0\0"):
            text = data.split(b"\0", 5)[-1].decode("utf-8", "replace")
        else:
            continue
        return text if len(text) <= _MAX_PARAMETERS else ""
    return ""


def _read_record_text(file: bytes) -> str | None:
    match detect_format(file):
        case "PNG":
            return _read_png_record(file)
        case "WEBP":
            exif = next((data for kind, data in _riff_chunks(file) if kind == b"EXIF"), None)
        case "JPEG":
            exif = next((data for data in _jpeg_app1_segments(file) if data.startswith(_EXIF_PREFIX)), None)
        case _:
            exif = None
    return _read_user_comment(exif.removeprefix(_EXIF_PREFIX)) if exif is not None else None


def _read_png_record(file: bytes) -> str | None:
    """The text of the uncompressed iTXt chunk named `record` (PNG, third edition, 11.3.3.4)."""
    for kind, data in _png_chunks(file):
        if kind == b"iTXt" and data.startswith(b"record\0\0"):
            return data.split(b"\0", 5)[-1].decode()
    return None


def _png_chunks(file: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Type and data of each chunk; the data of chunks over the size limit is empty."""
    offset = 8
    for _ in range(_MAX_CHUNKS):
        if offset + 8 > len(file):
            return
        length, kind = struct.unpack_from(">I4s", file, offset)
        yield kind, file[offset + 8 : offset + 8 + length] if length <= _MAX_RECORD_BYTES else b""
        offset += 12 + length


def _riff_chunks(file: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Type and data of each chunk; the data of chunks over four times the size limit is empty."""
    offset = 12
    for _ in range(_MAX_CHUNKS):
        if offset + 8 > len(file):
            return
        kind, length = struct.unpack_from("<4sI", file, offset)
        yield kind, file[offset + 8 : offset + 8 + length] if length <= 4 * _MAX_RECORD_BYTES else b""
        offset += 8 + length + length % 2


def _jpeg_app1_segments(file: bytes) -> Iterator[bytes]:
    """The content of each APP1 segment before the image data."""
    offset = 2
    for _ in range(_MAX_CHUNKS):
        if offset + 4 > len(file):
            return
        lead, marker, length = struct.unpack_from(">BBH", file, offset)
        if lead != 0xFF or marker == 0xDA or length < 2:
            return
        if marker == 0xE1:
            yield file[offset + 4 : offset + 2 + length]
        offset += 2 + length


def _read_user_comment(tiff: bytes) -> str | None:
    """The EXIF UserComment, if it is in UTF-16, as this server writes it."""
    byte_order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if byte_order is None:
        return None
    exif_ifd = _find_tag(tiff, byte_order, struct.unpack_from(f"{byte_order}I", tiff, 4)[0], _EXIF_IFD)
    comment = _find_tag(tiff, byte_order, exif_ifd[1], _USER_COMMENT) if exif_ifd is not None else None
    if comment is None:
        return None
    count, offset = comment
    data = tiff[offset : offset + count]
    return data.removeprefix(_UNICODE_PREFIX).decode("utf-16-be") if data.startswith(_UNICODE_PREFIX) else None


def _find_tag(tiff: bytes, byte_order: str, directory: int, tag: int) -> tuple[int, int] | None:
    """Count and value of a tag in the directory at an offset."""
    (entries,) = struct.unpack_from(f"{byte_order}H", tiff, directory)
    for number in range(entries):
        found, _, count, value = struct.unpack_from(f"{byte_order}HHII", tiff, directory + 2 + 12 * number)
        if found == tag:
            return count, value
    return None
