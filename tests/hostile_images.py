"""Malicious image files, each made in memory: bombs, many scans or frames, metadata, polyglots."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Iterator

import numpy as np
from fakes import disc, file_of
from PIL import Image

SECRET = b"kept-out-of-what-is-stored"
_SOI, _EOI, _SOS = 0xD8, 0xD9, 0xDA
_WITHIN_A_SCAN = (0x00, *range(0xD0, 0xD8))


def png_chunk(kind: bytes, data: bytes) -> bytes:
    """One chunk, with a valid checksum."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_claiming(width: int, height: int, compressed: bytes = zlib.compress(b"\0")) -> bytes:
    """A PNG whose header claims a size, in 8-bit RGB; `compressed` is its pixel data."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", compressed) + png_chunk(b"IEND", b"")


def png_with(kind: bytes, data: bytes, picture: bytes) -> bytes:
    """A PNG with one more chunk right behind its header."""
    behind = 8 + 25
    return picture[:behind] + png_chunk(kind, data) + picture[behind:]


def jpeg_of_many_scans(width: int, height: int, times: int) -> bytes:
    """A progressive JPEG that repeats its shortest scan `times` times: few bytes each, but all blocks are processed."""
    target = io.BytesIO()
    Image.new("L", (width, height), 77).save(target, "JPEG", progressive=True, quality=10)
    data = target.getvalue()
    scans = [part for part in _parts_of_jpeg(data) if data[part.start + 1] == _SOS][1:]
    shortest = min(scans, key=lambda part: part.stop - part.start)
    return data[: shortest.stop] + data[shortest] * times + data[shortest.stop :]


def _parts_of_jpeg(data: bytes) -> Iterator[slice]:
    """Marker segments in their order, a scan with its compressed data."""
    start = 2
    while data[start + 1] != _EOI:
        end = start + 2 + int.from_bytes(data[start + 2 : start + 4], "big")
        if data[start + 1] == _SOS:
            while data[end] != 0xFF or data[end + 1] in _WITHIN_A_SCAN:
                end += 1
        yield slice(start, end)
        start = end


def jpeg_with(segment: bytes, data: bytes, picture: bytes) -> bytes:
    """A JPEG with an additional marker segment at its start; `segment` is the marker."""
    return picture[:2] + segment + struct.pack(">H", len(data) + 2) + data + picture[2:]


def jpeg_with_profile(size: int, picture: bytes) -> bytes:
    """A JPEG with an ICC profile of about `size` bytes, in as many segments as needed."""
    piece = 65_000
    count = -(-size // piece)
    for number in range(count, 0, -1):
        head = b"ICC_PROFILE\0" + bytes([number, count])
        picture = jpeg_with(b"\xff\xe2", head + SECRET.ljust(piece, b"."), picture)
    return picture


def exif_that_loops() -> bytes:
    """EXIF in which the next directory and the GPS directory point to the first one."""
    entries = [(0x0112, 3, 1, 6 << 16), (0x8769, 4, 1, 8), (0x8825, 4, 1, 8)]
    directory = b"".join(struct.pack(">HHII", *entry) for entry in entries)
    return b"Exif\0\0MM\0\x2a" + struct.pack(">IH", 8, len(entries)) + directory + struct.pack(">I", 8)


def exif_of_a_place() -> Image.Exif:
    """Where a photograph was taken, and by whom."""
    exif = Image.Exif()
    exif[0x010E] = exif[0x013B] = SECRET.decode()
    exif.get_ifd(0x8825).update({1: "N", 2: (48.0, 51.0, 29.0), 3: "E", 4: (2.0, 17.0, 40.0), 27: SECRET})
    return exif


def gif_of_frames(frames: int, *, second: str = "blue") -> bytes:
    """A red GIF whose later frames, each of few bytes, have another colour."""
    size = (16, 16)
    target = io.BytesIO()
    pictures = [Image.new("P", size, place) for place in (0, 1)]
    for picture in pictures:
        picture.putpalette(Image.new("RGB", (1, 1), "red").tobytes() + Image.new("RGB", (1, 1), second).tobytes())
    pictures[0].save(target, "GIF", save_all=True, append_images=[pictures[1]], loop=0)
    data = target.getvalue()
    start = data.rindex(b"\x21\xf9")  # the second frame: its control block to the end
    return data[:start] + data[start:-1] * (frames - 1) + data[-1:]


def webp_of_frames(frames: int) -> bytes:
    """A red WebP whose later frames, all alike, are blue."""
    target = io.BytesIO()
    red, blue = (Image.new("RGB", (16, 16), colour) for colour in ("red", "blue"))
    red.save(target, "WEBP", save_all=True, append_images=[blue], lossless=True)
    data = target.getvalue()
    start = data.rindex(b"ANMF")
    body = data[8:start] + data[start:] * (frames - 1)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def apng_of_frames(frames: int) -> bytes:
    """A red PNG followed by an animation of that many frames, all blue."""
    picture = file_of(np.full((16, 16, 3), (255, 0, 0), np.uint8))
    pixels = zlib.compress((b"\0" + b"\0\0\xff" * 16) * 16)
    parts = []
    for number in range(frames):
        control = struct.pack(">IIIIIHHBB", 2 * number, 16, 16, 0, 0, 1, 50, 0, 0)
        parts.append(png_chunk(b"fcTL", control) + png_chunk(b"fdAT", struct.pack(">I", 2 * number + 1) + pixels))
    before_end = picture.rindex(b"IEND") - 4
    animated = picture[:before_end] + b"".join(parts) + picture[before_end:]
    return png_with(b"acTL", struct.pack(">II", frames, 0), animated)


def polyglots() -> dict[str, bytes]:
    """Files that are a PNG and also something else: after its end, and in a text chunk."""
    picture = file_of(disc())
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as made:
        made.writestr("index.html", SECRET)
    script = b"<svg xmlns='http://www.w3.org/2000/svg'><script>" + SECRET + b"</script></svg>"
    pdf = b"%PDF-1.7\n1 0 obj\n<< /Type /Catalog >> % " + SECRET + b"\nendobj\ntrailer << /Root 1 0 R >>\n%%EOF"
    return {
        "zip": picture + archive.getvalue(),
        "svg": png_with(b"tEXt", b"Comment\0" + script, picture),
        "pdf": png_with(b"tEXt", b"Comment\0" + pdf, picture),
        "html": png_with(b"tEXt", b"Comment\0<html><script>" + SECRET + b"</script>", picture),
    }


def foreign() -> dict[str, bytes]:
    """File types that Pillow reads and this server does not, as short as recognisable."""
    fits = "".join(
        f"{line:<80}" for line in ("SIMPLE  =                    T", "BITPIX  =                    8", "END")
    )
    return {
        "fits": fits.encode().ljust(2880),
        "psd": b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, 4, 4, 8, 3) + bytes(64),
        "tiff": file_of(disc(), "TIFF"),
        "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(/etc/passwd) run\n",
        "dds": file_of(disc(), "DDS"),
        "fpx": b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(504),
        "jpeg 2000": file_of(disc(), "JPEG2000"),
        "bmp": file_of(disc(), "BMP"),
        "ico": file_of(disc(), "ICO"),
        "ppm": file_of(disc(), "PPM"),
        "pcx": file_of(disc(), "PCX"),
        "tga": file_of(disc(), "TGA"),
        "wmf": b"\xd7\xcd\xc6\x9a\x00\x00" + bytes(64),
        "gif": file_of(disc(), "GIF"),
        "avif": file_of(disc(), "AVIF"),
        "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "pdf": file_of(disc(), "PDF"),
        "zip": b"PK\x03\x04" + bytes(60),
        "a png behind a pdf": b"%PDF-1.7\n" + file_of(disc()),
    }
