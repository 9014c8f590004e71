"""Decoding in sandboxed processes: every kind of image, every kind of failure, and no leaks."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import struct
import zlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import disc, file_of, until
from PIL import Image

from stable_diffusion_server.errors import InvalidInput, NotReady, ServerError, TooLarge, UnsupportedMedia
from stable_diffusion_server.imaging.sandbox import worker
from stable_diffusion_server.imaging.sandbox.pool import DecoderPool

LIMITS = {"max_bytes": 1_000_000, "max_pixels": 40_000, "max_side": 1000}


@pytest.fixture
async def decoder() -> AsyncIterator[DecoderPool]:
    """A pool of one process with small limits."""
    decoder = DecoderPool(**LIMITS, processes=1, seconds=20)
    yield decoder
    await decoder.close()


def children(program: str = worker.__file__) -> set[int]:
    """Running decoder processes of this process."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == os.getpid() and program.encode() in (entry / "cmdline").read_bytes():
                found.add(int(entry.name))
        except (OSError, ValueError):
            continue
    return found


def png_claiming(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header claims a size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP"])
async def test_a_picture_comes_back_as_rgb_pixels(decoder: DecoderPool, file_format: str) -> None:
    """Shape, dtype and colours; bit-exact for lossless formats."""
    pixels = disc()
    options: dict[str, Any] = {"WEBP": {"lossless": True}, "JPEG": {"quality": 95, "subsampling": 0}, "PNG": {}}[
        file_format
    ]
    decoded = await decoder.decode(file_of(pixels, file_format, **options), "image_file")
    assert (decoded.shape, decoded.dtype) == (pixels.shape, np.uint8)
    assert np.abs(decoded.astype(int) - pixels).mean() <= (2 if file_format == "JPEG" else 0)


@pytest.mark.fault(27)
@pytest.mark.parametrize(
    ("mode", "colour", "seen"),
    [
        ("1", 1, (255, 255, 255)),
        ("L", 100, (100, 100, 100)),
        ("LA", (0, 0), (255, 255, 255)),
        ("LA", (100, 255), (100, 100, 100)),
        ("RGBA", (255, 0, 0, 128), (255, 127, 127)),
        ("RGBA", (9, 9, 9, 0), (255, 255, 255)),
        ("I;16", 25700, (100, 100, 100)),
        ("CMYK", (0, 255, 255, 0), (254, 0, 0)),
    ],
)
async def test_every_mode_becomes_rgb_over_white(
    decoder: DecoderPool, mode: str, colour: Any, seen: tuple[int]
) -> None:
    """Grey, one bit, sixteen bits (scaled, not clipped), transparency, CMYK."""
    picture = Image.new(mode, (5, 4), colour)
    target = io.BytesIO()
    picture.save(target, "JPEG" if mode == "CMYK" else "PNG")
    decoded = await decoder.decode(target.getvalue(), "image_file")
    assert np.abs(decoded.reshape(-1, 3).astype(int) - seen).max() <= 1


@pytest.mark.fault(27)
async def test_a_palette_with_transparency_becomes_rgb_over_white(decoder: DecoderPool) -> None:
    """A transparent palette entry shows the white behind it."""
    picture = Image.new("P", (4, 4), 0)
    picture.putpalette([255, 0, 0, 0, 0, 255])
    target = io.BytesIO()
    picture.save(target, "PNG", transparency=0)
    assert (await decoder.decode(target.getvalue(), "image_file") == 255).all()


@pytest.mark.fault(29)
async def test_a_mask_may_be_given_by_transparency(decoder: DecoderPool) -> None:
    """White where the image is transparent, black where it is not, whatever its colours; without alpha all black."""
    pixels = np.full((8, 6, 4), 255, np.uint8)
    pixels[2:5, 1:3, 3] = 0
    target = io.BytesIO()
    Image.fromarray(pixels).save(target, "PNG")
    mask = await decoder.decode(target.getvalue(), "mask", transparency=True)
    assert (mask[..., 0] == 255 - pixels[..., 3]).all()
    assert not (await decoder.decode(file_of(pixels[..., :3]), "mask", transparency=True)).any()


@pytest.mark.fault(28)
@pytest.mark.parametrize("orientation", range(1, 9))
async def test_a_photograph_is_turned_as_its_exif_says(decoder: DecoderPool, orientation: int) -> None:
    """All eight EXIF orientations give the same upright image."""
    upright = np.zeros((16, 24, 3), np.uint8)
    upright[:8, :8] = 255
    lying = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    decoded = await decoder.decode(file_of(np.ascontiguousarray(lying), "PNG", exif=exif), "image_file")
    assert (decoded == upright).all()


async def test_only_the_first_frame_of_an_animation_is_seen(decoder: DecoderPool) -> None:
    """An animated WebP of two colours gives the first."""
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "blue")]
    target = io.BytesIO()
    frames[0].save(target, "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    decoded = await decoder.decode(target.getvalue(), "image_file")
    assert (decoded == (255, 0, 0)).all()


PNG, JPEG = file_of(disc()), file_of(disc(), "JPEG", quality=95)
BAD: list[tuple[str, bytes, type[ServerError]]] = [
    ("nothing", b"", UnsupportedMedia),
    ("text", b"hello, world", UnsupportedMedia),
    ("html", b"<html>" * 10, UnsupportedMedia),
    ("svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>", UnsupportedMedia),
    ("gif", file_of(disc(), "GIF"), UnsupportedMedia),
    ("bmp", file_of(disc(), "BMP"), UnsupportedMedia),
    ("tiff", file_of(disc(), "TIFF"), UnsupportedMedia),
    ("half a png", PNG[: len(PNG) // 2], InvalidInput),
    ("half a jpeg", JPEG[: len(JPEG) * 3 // 4], InvalidInput),
    ("a header only", PNG[:33], UnsupportedMedia),
    ("a bomb", png_claiming(50_000, 50_000), InvalidInput),
    ("a lie", png_claiming(200, 200), InvalidInput),
    ("too long a side", file_of(np.zeros((1, 1001, 3), np.uint8)), InvalidInput),
    ("too many bytes", PNG.ljust(LIMITS["max_bytes"] + 1, b"\0"), TooLarge),
]


@pytest.mark.fault(19, 20, 21, 23, 31)
@pytest.mark.parametrize(("data", "error"), [bad[1:] for bad in BAD], ids=[bad[0] for bad in BAD])
async def test_what_is_no_good_picture_is_refused_by_name(
    decoder: DecoderPool, data: bytes, error: type[ServerError]
) -> None:
    """The error names the parameter, and the next image is decoded normally."""
    with pytest.raises(error) as refused:
        await decoder.decode(data, "mask_file")
    assert refused.value.field == "mask_file"
    assert (await decoder.decode(PNG, "image_file")).shape == disc().shape


@pytest.mark.fault(24)
async def test_a_picture_at_every_limit_is_taken(decoder: DecoderPool) -> None:
    """Maximum pixels, side and bytes are accepted; one pixel more is not."""
    assert (await decoder.decode(file_of(np.zeros((200, 200, 3), np.uint8)), "image_file")).shape == (200, 200, 3)
    assert (await decoder.decode(file_of(np.zeros((40, 1000, 3), np.uint8)), "image_file")).shape == (40, 1000, 3)
    await decoder.decode(PNG.ljust(LIMITS["max_bytes"], b"\0"), "image_file")
    with pytest.raises(InvalidInput):
        await decoder.decode(file_of(np.zeros((200, 201, 3), np.uint8)), "image_file")


@pytest.mark.fault(32)
async def test_a_child_that_crashes_costs_one_request(tmp_path: Path) -> None:
    """A decoder that crashes on an image is a 4xx for that image; a new process serves the next."""
    decoder = DecoderPool(**LIMITS, processes=1, program=program_that("os.kill(os.getpid(), signal.SIGSEGV)", tmp_path))
    with pytest.raises(InvalidInput, match="could not be decoded"):
        await decoder.decode(PNG, "image_file")
    assert (await decoder.decode(PNG, "image_file")).shape == disc().shape
    await decoder.close()


@pytest.mark.fault(32)
async def test_a_child_that_loops_is_ended(tmp_path: Path) -> None:
    """An image on which the decoder loops is refused after the timeout, and the process is killed."""
    program = program_that("signal.pause()", tmp_path)
    decoder = DecoderPool(**LIMITS, processes=1, seconds=2, program=program)
    with pytest.raises(InvalidInput, match="too long"):
        await decoder.decode(PNG, "image_file")
    assert children(program) == set()
    assert (await decoder.decode(PNG, "image_file")).shape == disc().shape
    await decoder.close()


async def test_a_caller_who_leaves_ends_the_child(tmp_path: Path) -> None:
    """The work of a cancelled request stops, and its slot is free."""
    program = program_that("signal.pause()", tmp_path)
    decoder = DecoderPool(**LIMITS, processes=1, program=program)
    decoding = asyncio.create_task(decoder.decode(PNG, "image_file"))
    await asyncio.to_thread(until, (tmp_path / "done-once").exists)
    decoding.cancel()
    with pytest.raises(asyncio.CancelledError):
        await decoding
    assert children(program) == set()
    assert (await decoder.decode(PNG, "image_file")).shape == disc().shape
    await decoder.close()


async def test_a_child_that_died_while_idle_is_replaced_unnoticed(decoder: DecoderPool) -> None:
    """The kernel may kill a process at any time; the next image is not refused for it."""
    await decoder.decode(PNG, "image_file")
    for pid in children():
        os.kill(pid, signal.SIGKILL)
    assert (await decoder.decode(PNG, "image_file")).shape == disc().shape


async def test_a_child_sees_no_environment_and_bounds_itself(
    decoder: DecoderPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The environment holds no server secret, and memory, files and core dumps are limited."""
    monkeypatch.setenv("API_KEYS", "secret")
    await decoder.decode(PNG, "image_file")
    (pid,) = children()
    reported = {name: await asyncio.to_thread(Path(f"/proc/{pid}/{name}").read_text) for name in ("environ", "limits")}
    assert reported["environ"] == ""
    limits = {line[:26].strip(): line[26:].split()[0] for line in reported["limits"].splitlines()}
    assert int(limits["Max address space"]) < 2**30
    assert (limits["Max file size"], limits["Max core file size"]) == ("0", "0")
    assert int(limits["Max cpu time"]) < 60


async def test_many_pictures_at_once_use_the_children_there_are() -> None:
    """Twenty at once, two processes, twenty images, each its own."""
    decoder = DecoderPool(**LIMITS, processes=2)
    shades = [np.full((8, 8, 3), shade, np.uint8) for shade in range(0, 200, 10)]
    decoded = await asyncio.gather(*(decoder.decode(file_of(shade), "image_file") for shade in shades))
    assert all((a == b).all() for a, b in zip(decoded, shades, strict=True))
    assert 1 <= len(children()) <= 2
    await decoder.close()


async def test_nothing_is_left_when_the_pool_is_closed() -> None:
    """No process remains, and none is started."""
    decoder = DecoderPool(**LIMITS)
    assert children() == set()
    await decoder.decode(PNG, "image_file")
    assert len(children()) == 1
    await decoder.close()
    assert children() == set()
    with pytest.raises(NotReady):
        await decoder.decode(PNG, "image_file")


def program_that(deed: str, folder: Path) -> str:
    """A decoder program that runs a snippet on its first or on every image, and then the real one."""
    program = folder / "program.py"
    program.write_text(
        "import os, pathlib, runpy, signal, sys\n"
        f"mark = pathlib.Path({str(folder / 'done-once')!r})\n"
        "if not mark.exists():\n"
        "    sys.stdin.buffer.read(8)\n"
        "    mark.touch()\n"
        f"    {deed}\n"
        f"runpy.run_path({worker.__file__!r}, run_name='__main__')\n"
    )
    return str(program)
