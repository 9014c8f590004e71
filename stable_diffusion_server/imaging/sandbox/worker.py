"""The program of a decoding process: one picture at a time from stdin to stdout. Knows Pillow, and nothing of ours.

It is run by its path (`pool` starts it), imports nothing of the package, and sees no environment, so that there is
little to find for a picture that takes it over. Arguments: most pixels, longest side, bytes of address space, seconds
of CPU per picture, and the kinds of files that are taken.
"""

from __future__ import annotations

import io
import resource
import signal
import struct
import sys
import warnings
from collections.abc import Sequence
from typing import BinaryIO

from PIL import Image, ImageOps, UnidentifiedImageError

# A request is the length of the file and the file. An answer is a verdict and two numbers: for PIXELS width and
# height, followed by height × width × 3 bytes; for TOO_LARGE width and height alone.
REQUEST, ANSWER = struct.Struct(">Q?"), struct.Struct(">cII")
PIXELS, NOT_A_PICTURE, TOO_LARGE, BROKEN, NO_MEMORY = b"P", b"N", b"L", b"B", b"M"
_EXIF_ORIENTATION = 0x0112
_WEBP_HEAD = 30


def main() -> None:
    """Answer requests until stdin ends."""
    max_pixels, max_side, memory, seconds = (int(argument) for argument in sys.argv[1:5])
    formats = sys.argv[5:]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server, which then closes stdin
    warnings.simplefilter("ignore")
    Image.MAX_IMAGE_PIXELS = None  # `decode` looks at the size itself, before Pillow would
    _load_decoders(formats)
    _bound(resource.RLIMIT_AS, memory)
    _bound(resource.RLIMIT_CORE, 0)
    _bound(resource.RLIMIT_FSIZE, 0)
    _bound(resource.RLIMIT_NOFILE, 16)
    source, target = sys.stdin.buffer, sys.stdout.buffer
    while len(head := source.read(REQUEST.size)) == REQUEST.size:
        _allow_cpu(seconds)
        length, transparency = REQUEST.unpack(head)
        _answer(target, decode(source.read(length), formats, max_pixels, max_side, transparency=transparency))


def decode(
    data: bytes, formats: list[str], max_pixels: int, max_side: int, *, transparency: bool = False
) -> tuple[bytes, int, int, bytes]:
    """Verdict, width, height and pixels (8-bit RGB rows, top to bottom) of a file's first frame.

    The size is judged from the header, before a decoder has the file. Orientation by EXIF is applied, and what is
    transparent laid over white; with `transparency` the pixels tell how transparent it is instead, white where it is
    wholly so.
    """

    def too_large(width: int, height: int) -> bool:
        return width * height > max_pixels or max(width, height) > max_side

    if (claimed := _webp_size(data)) and too_large(*claimed):
        return TOO_LARGE, *claimed, b""
    try:
        picture = Image.open(io.BytesIO(data), formats=formats)
    except MemoryError:
        return NO_MEMORY, 0, 0, b""
    except UnidentifiedImageError:
        return NOT_A_PICTURE, 0, 0, b""
    except Exception:  # whatever a decoder raises, the picture is the cause
        return BROKEN, 0, 0, b""
    if too_large(*picture.size):
        return TOO_LARGE, *picture.size, b""
    try:
        picture.load()
        upright = _upright(picture)
        upright = transparency_of(upright) if transparency else to_rgb(upright)
        return PIXELS, upright.width, upright.height, upright.tobytes()
    except MemoryError:
        return NO_MEMORY, 0, 0, b""
    except Exception:  # as above
        return BROKEN, 0, 0, b""


def to_rgb(picture: Image.Image) -> Image.Image:
    """Any mode a picture may have as RGB, what is transparent over white."""
    if picture.mode.startswith(("I", "F")):
        # 16 bits of grey; Pillow's own conversion would clip them to 255 instead of scaling.
        picture = picture.convert("I").point(lambda value: value * (1 / 257)).convert("L")
    if "A" in picture.mode or "a" in picture.mode or "transparency" in picture.info:
        layer = picture.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    return picture.convert("RGB")


def transparency_of(picture: Image.Image) -> Image.Image:
    """How transparent a picture is, as grey in RGB: white where wholly so, black all over where it cannot be."""
    alpha = picture.convert("RGBA").getchannel("A")
    return alpha.point(lambda value: 255 - value).convert("RGB")


def _upright(picture: Image.Image) -> Image.Image:
    """Turned as EXIF says; EXIF that cannot be read turns nothing."""
    try:
        if picture.getexif().get(_EXIF_ORIENTATION, 1) == 1:
            return picture
        return ImageOps.exif_transpose(picture)
    except MemoryError:
        raise
    except Exception:  # a picture with broken EXIF is still a picture
        return picture


def _load_decoders(formats: Sequence[str]) -> None:
    """Load the decoders that may be needed, before memory is bounded, and none of Pillow's forty others."""
    Image.preinit()
    if "WEBP" in formats:
        from PIL import WebPImagePlugin  # noqa: F401  # importing it makes it known to Pillow
    if "AVIF" in formats:
        from PIL import AvifImagePlugin

        AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # each takes address space of its own


def _webp_size(data: bytes) -> tuple[int, int] | None:
    """Width and height a WebP claims in its first chunk, `None` for other files: its decoder makes room at once.

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
    """Allow that much more CPU time than was used so far; beyond it the kernel ends the process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + 1 + seconds, hard))


def _bound(what: int, limit: int) -> None:
    hard = resource.getrlimit(what)[1]
    limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(what, (limit, limit))


if __name__ == "__main__":
    main()
