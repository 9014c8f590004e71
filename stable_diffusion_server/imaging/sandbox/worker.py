"""The program of a decoding process: reads image files from stdin, one at a time, and writes pixels to stdout.

`pool` runs it by its path. It imports nothing of the package and gets no environment variables, so a malicious image
that takes it over finds little. Arguments: maximum pixels, maximum side, bytes of address space, CPU seconds per image,
and the accepted formats.
"""

from __future__ import annotations

import importlib.util
import io
import os
import resource
import signal
import struct
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import BinaryIO

from PIL import Image, ImageOps, UnidentifiedImageError

# A request is the length of the file, a kind and the file. An answer is a verdict, width and height, which are 0 except
# for PIXELS and TOO_LARGE; after PIXELS follow height × width × 3 bytes. After RESULT and TO_SIGN follow `width` bytes;
# TO_SIGN is answered with the length of a signature and the signature.
REQUEST, ANSWER, SIGNATURE = struct.Struct(">QB"), struct.Struct(">cII"), struct.Struct(">I")
DECODE, SHOW_TRANSPARENCY, SIGN_CREDENTIALS, READ_CREDENTIALS = range(4)
PIXELS, NOT_AN_IMAGE, TOO_LARGE, BROKEN, NO_MEMORY = b"P", b"N", b"L", b"B", b"M"
RESULT, TO_SIGN = b"R", b"S"
_EXIF_ORIENTATION = 0x0112
_WEBP_HEAD = 30


def main() -> None:
    """Answer requests until stdin ends."""
    max_pixels, max_side, memory, seconds = (int(argument) for argument in sys.argv[1:5])
    formats = sys.argv[5:]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Ctrl-C the server closes stdin
    warnings.simplefilter("ignore")
    Image.MAX_IMAGE_PIXELS = None  # `decode` checks the size before Pillow would
    _load_decoders(formats)
    _limit_resource(resource.RLIMIT_AS, memory)
    _limit_resource(resource.RLIMIT_CORE, 0)
    _limit_resource(resource.RLIMIT_FSIZE, 0)
    _limit_resource(resource.RLIMIT_NOFILE, 16)
    source, target = sys.stdin.buffer, sys.stdout.buffer
    while len(head := source.read(REQUEST.size)) == REQUEST.size:
        _allow_cpu(seconds)
        length, kind = REQUEST.unpack(head)
        data = source.read(length)
        if kind in (SIGN_CREDENTIALS, READ_CREDENTIALS):
            answer = handle_credentials(data, source, target, signs=kind == SIGN_CREDENTIALS)
        else:
            answer = decode(data, formats, max_pixels, max_side, transparency=kind == SHOW_TRANSPARENCY)
        _answer(target, answer)


def handle_credentials(
    data: bytes, source: BinaryIO, target: BinaryIO, *, signs: bool
) -> tuple[bytes, int, int, bytes]:
    """Sign a file or read its credentials; the other side signs the bytes of the claim."""

    def ask(claim: bytes) -> bytes:
        _answer(target, (TO_SIGN, len(claim), 0, claim))
        return source.read(*SIGNATURE.unpack(source.read(SIGNATURE.size)))

    try:
        credentials = _load_credentials()
        with _nothing_opened():
            result = credentials.sign(data, ask) if signs else credentials.inspect(data)
    except MemoryError:
        return NO_MEMORY, 0, 0, b""
    except Exception:  # the library raises anything for a broken manifest
        return BROKEN, 0, 0, b""
    return RESULT, len(result), 0, result


def _load_credentials() -> ModuleType:
    """The module beside this one, loaded when it is first needed: it takes 0.1 seconds and 40 MB."""
    if (loaded := sys.modules.get("credentials")) is not None:
        return loaded
    spec = importlib.util.spec_from_file_location("credentials", Path(__file__).with_name("credentials.py"))
    if spec is None or spec.loader is None:
        raise ImportError("credentials.py is not beside the worker")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["credentials"] = module
    return module


@contextmanager
def _nothing_opened() -> Iterator[None]:
    """The process can open nothing meanwhile: no file and no socket. Afterwards decoders may import their modules."""
    free = os.dup(0)
    os.close(free)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(free, soft), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def decode(
    data: bytes, formats: list[str], max_pixels: int, max_side: int, *, transparency: bool = False
) -> tuple[bytes, int, int, bytes]:
    """Decode the first frame of a file to a verdict, width, height and pixels (8-bit RGB rows, top to bottom).

    The size is checked in the header, before the decoder runs. EXIF orientation is applied, and transparent pixels are
    blended with white; with `transparency` the pixels show transparency instead, white where fully transparent.
    """

    def too_large(width: int, height: int) -> bool:
        return width * height > max_pixels or max(width, height) > max_side

    if (size := _webp_size(data)) and too_large(*size):
        return TOO_LARGE, *size, b""
    try:
        image = Image.open(io.BytesIO(data), formats=formats)
    except MemoryError:
        return NO_MEMORY, 0, 0, b""
    except UnidentifiedImageError:
        return NOT_AN_IMAGE, 0, 0, b""
    except Exception:  # decoders raise anything for a broken image
        return BROKEN, 0, 0, b""
    if too_large(*image.size):
        return TOO_LARGE, *image.size, b""
    try:
        image.load()
        upright = _apply_orientation(image)
        upright = transparency_of(upright) if transparency else to_rgb(upright)
        return PIXELS, upright.width, upright.height, upright.tobytes()
    except MemoryError:
        return NO_MEMORY, 0, 0, b""
    except Exception:  # as above
        return BROKEN, 0, 0, b""


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGB; transparent pixels are blended with white."""
    if image.mode.startswith(("I", "F")):
        # Pillow converts 16-bit grey to 8 bits by clipping at 255 instead of scaling.
        image = image.convert("I").point(lambda value: value * (1 / 257)).convert("L")
    if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def transparency_of(image: Image.Image) -> Image.Image:
    """Transparency as grey RGB: white where fully transparent, black for an image without transparency."""
    alpha = image.convert("RGBA").getchannel("A")
    return alpha.point(lambda value: 255 - value).convert("RGB")


def _apply_orientation(image: Image.Image) -> Image.Image:
    """Rotate by the EXIF orientation; unreadable EXIF is ignored."""
    try:
        if image.getexif().get(_EXIF_ORIENTATION, 1) == 1:
            return image
        return ImageOps.exif_transpose(image)
    except MemoryError:
        raise
    except Exception:  # broken EXIF does not make an image invalid
        return image


def _load_decoders(formats: Sequence[str]) -> None:
    """Load the needed decoders before memory is limited, and none of Pillow's forty others."""
    Image.preinit()
    if "WEBP" in formats:
        from PIL import WebPImagePlugin  # noqa: F401  # registers itself with Pillow
    if "AVIF" in formats:
        from PIL import AvifImagePlugin

        AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # each thread takes address space
    if "TIFF" in formats:
        from PIL import TiffImagePlugin  # noqa: F401  # as above


def _webp_size(data: bytes) -> tuple[int, int] | None:
    """Width and height in the header of a WebP, `None` for other files; its decoder allocates memory on opening.

    https://developers.google.com/speed/webp/docs/riff_container
    """
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP" or len(data) < _WEBP_HEAD:
        return None
    match data[12:16]:
        case b"VP8X":
            return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
        case b"VP8L":
            both = int.from_bytes(data[21:25], "little")
            return (both & 0x3FFF) + 1, (both >> 14 & 0x3FFF) + 1
        case b"VP8 ":
            return int.from_bytes(data[26:28], "little") & 0x3FFF, int.from_bytes(data[28:30], "little") & 0x3FFF
    return None


def _answer(target: BinaryIO, answer: tuple[bytes, int, int, bytes]) -> None:
    verdict, width, height, pixels = answer
    target.write(ANSWER.pack(verdict, min(width, 2**32 - 1), min(height, 2**32 - 1)))
    target.write(pixels)
    target.flush()


def _allow_cpu(seconds: int) -> None:
    """Allow `seconds` of CPU time beyond what was used so far; after that the kernel kills the process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + 1 + seconds, hard))


def _limit_resource(resource_id: int, limit: int) -> None:
    hard = resource.getrlimit(resource_id)[1]
    limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(resource_id, (limit, limit))


if __name__ == "__main__":
    main()
