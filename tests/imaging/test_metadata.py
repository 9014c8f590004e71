"""Image metadata, read without a decoder."""

from __future__ import annotations

import io

import pytest
from fakes import disc, file_of
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from stable_diffusion_server.imaging.encode import encode_image
from stable_diffusion_server.imaging.formats import is_complete_file
from stable_diffusion_server.imaging.metadata import read_record
from stable_diffusion_server.types import Format

RECORD = {"prompt": "ein größeres 🟥\n\0 " * 50, "seed": 7, "asked": {"loras": [["pastel", 0.5]]}}
FILES = {file_format: encode_image(disc(), file_format, 85, RECORD) for file_format in Format}


@pytest.mark.parametrize("file_format", list(Format))
@pytest.mark.parametrize("quality", [20, 100])
def test_what_is_written_is_read_back(file_format: Format, quality: int) -> None:
    """In every format, with any text; without metadata the result is empty."""
    assert read_record(encode_image(disc(), file_format, quality, RECORD)) == RECORD
    assert read_record(encode_image(disc(), file_format, quality, None)) is None


def test_what_other_programs_wrote_is_no_record() -> None:
    """Another comment, another byte order, a list instead of the record."""
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"ASCII\0\0\0[1, 2]"
    target = io.BytesIO()
    Image.fromarray(disc()).save(target, "JPEG", exif=exif)
    assert read_record(target.getvalue()) is None
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + "[1, 2]".encode("utf-16-be")
    target = io.BytesIO()
    Image.fromarray(disc()).save(target, "WEBP", exif=exif)
    assert read_record(target.getvalue()) is None


@given(st.sampled_from(list(Format)), st.data())
def test_no_file_however_broken_raises(file_format: Format, data: st.DataObject) -> None:
    """Truncated anywhere, with any bytes changed: a mapping or nothing."""
    file = bytearray(FILES[file_format])
    for _ in range(data.draw(st.integers(0, 8))):
        file[data.draw(st.integers(0, min(400, len(file) - 1)))] = data.draw(st.integers(0, 255))
    found = read_record(bytes(file[: data.draw(st.integers(0, len(file)))]))
    assert found is None or isinstance(found, dict)


@given(st.binary(max_size=200), st.sampled_from([b"", b"\x89PNG", b"\xff\xd8", b"RIFF0000WEBP"]))
def test_no_bytes_at_all_raise(data: bytes, head: bytes) -> None:
    """Any input bytes."""
    assert read_record(head + data) is None or isinstance(read_record(head + data), dict)


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP"])
def test_a_whole_picture_is_distinguished_from_a_truncated_one(file_format: str) -> None:
    """By first bytes, last bytes and length alone."""
    file = file_of(disc(), file_format)
    assert is_complete_file(file[:12], file[-12:], len(file))
    for size in (0, 1, 11, 12, 20, len(file) // 2, len(file) - 1):
        part = file[:size]
        assert not is_complete_file(part[:12], part[-12:], size)
    assert not is_complete_file(b"something el", b"se entirely.", 100)
