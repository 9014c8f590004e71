"""Malicious images, in the real decoder processes: refused by name or decoded harmlessly, and no leaks."""

from __future__ import annotations

import asyncio
import resource
import zlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from fakes import disc, file_of
from hostile_images import (
    SECRET,
    apng_of_frames,
    exif_that_loops,
    foreign,
    gif_of_frames,
    jpeg_of_many_scans,
    jpeg_with,
    jpeg_with_profile,
    png_claiming,
    png_with,
    polyglots,
    webp_of_frames,
)

from stable_diffusion_server.errors import InvalidInput, UnsupportedMedia
from stable_diffusion_server.imaging.formats import DEFAULT_FORMATS, OPTIONAL_FORMATS
from stable_diffusion_server.imaging.sandbox.pool import DecoderPool

GOOD = file_of(disc())
RED = (255, 0, 0)
EVERY = (*DEFAULT_FORMATS, *OPTIONAL_FORMATS)


@pytest.fixture
async def decoder() -> AsyncIterator[DecoderPool]:
    """One process that accepts every type, within the server's own limits."""
    decoder = DecoderPool(
        max_bytes=20 * 2**20, max_pixels=2**24, max_side=16_383, processes=1, seconds=60, formats=EVERY
    )
    yield decoder
    await decoder.close()


async def same_child_serves_on(decoder: DecoderPool) -> None:
    """Shows that the previous image did not harm the process."""
    (worker,) = decoder._idle
    before = worker.images
    assert before > 0
    assert (await decoder.decode(GOOD, "image_file") == disc()).all()
    assert worker.images == before + 1


@pytest.mark.fault(22)
@pytest.mark.parametrize("other", ["zip", "svg", "pdf", "html"])
async def test_a_png_that_is_also_something_else_is_its_picture_alone(decoder: DecoderPool, other: str) -> None:
    """The process returns pixels only, so only pixels can be stored."""
    assert SECRET in polyglots()[other] or other == "zip"
    assert (await decoder.decode(polyglots()[other], "image_file") == disc()).all()
    await same_child_serves_on(decoder)


BOMBS = {
    "png": png_claiming(50_000, 50_000),
    "png with all its pixels": png_claiming(50_000, 50_000, zlib.compress(bytes(50_000 * 150_001 // 1000), 9)),
    "jpeg": b"\xff\xd8\xff\xc0\x00\x11\x08"
    + (50_000).to_bytes(2, "big") * 2
    + b"\x03\x01\x22\x00\x02\x11\x01\x03\x11\x01",
    "webp": b"RIFF\x2a\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + (49_999).to_bytes(3, "little") * 2 + b"VP8 \0\0\0\0",
    "webp, lossless": b"RIFF\x2a\0\0\0WEBPVP8L\x0a\0\0\0\x2f" + (2**28 - 1).to_bytes(4, "little") + bytes(16),
    "gif": b"GIF89a"
    + (50_000).to_bytes(2, "little") * 2
    + b"\x80\0\0"
    + bytes(6)
    + b",\0\0\0\0\x50\xc3\x50\xc3\0\2\1\0\0;",
}


@pytest.mark.fault(23)
@pytest.mark.parametrize("bomb", BOMBS)
async def test_a_bomb_is_refused_by_what_its_header_claims(decoder: DecoderPool, bomb: str) -> None:
    """Width and height are checked before decoding: the process's memory does not grow."""
    await decoder.decode(GOOD, "image_file")
    before = await asyncio.to_thread(peak_memory, decoder)
    with pytest.raises(InvalidInput, match="16777216 pixels and 16383 a side are taken"):
        await decoder.decode(BOMBS[bomb], "image_file")
    assert await asyncio.to_thread(peak_memory, decoder) - before < 32 * 2**20
    await same_child_serves_on(decoder)


def peak_memory(decoder: DecoderPool) -> int:
    """Peak memory of the one process, in bytes."""
    (worker,) = decoder._idle
    reported = Path(f"/proc/{worker._process.pid}/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in reported.splitlines() if line.startswith("VmHWM"))


@pytest.mark.fault(32)
async def test_what_takes_too_much_memory_costs_one_request() -> None:
    """A process cannot exceed its memory limit: the image is refused, and the next one decoded."""
    decoder = DecoderPool(max_bytes=2**20, max_pixels=2**28, max_side=2**14, processes=1, seconds=60)
    worker = await decoder._start()
    resource.prlimit(worker._process.pid, resource.RLIMIT_AS, (256 * 2**20, 256 * 2**20))
    decoder._idle.append(worker)
    rows = zlib.compress(bytes(8000 * (8000 * 3 + 1)), 1)
    with pytest.raises(InvalidInput, match=r"too much memory|could not be decoded"):
        await decoder.decode(png_claiming(8000, 8000, rows), "image_file")
    assert (await decoder.decode(GOOD, "image_file") == disc()).all()
    await decoder.close()


@pytest.mark.fault(25)
async def test_a_jpeg_of_very_many_scans_is_ended_after_its_time() -> None:
    """A hundred kilobytes that would take minutes: refused at the timeout, and the next is decoded."""
    bomb = jpeg_of_many_scans(2000, 2000, 20_000)
    assert len(bomb) < 2**20
    decoder = DecoderPool(max_bytes=2**20, max_pixels=2**24, max_side=16_383, processes=1, seconds=2)
    with pytest.raises(InvalidInput, match=r"took too long to decode|could not be decoded"):
        await decoder.decode(bomb, "image_file")
    decoder._seconds = 60  # the valid image may take long on a busy machine
    assert (await decoder.decode(GOOD, "image_file") == disc()).all()
    await decoder.close()


@pytest.mark.fault(25)
async def test_the_kernel_ends_a_child_that_uses_up_its_time() -> None:
    """If the server's timeout came too late, the CPU time limit still applies."""
    limited = DecoderPool(max_bytes=2**20, max_pixels=2**24, max_side=16_383, processes=1, seconds=0.1)
    limited._idle.append(await limited._start())
    limited._seconds = 200  # so that the server's timeout does not end it first
    with pytest.raises(InvalidInput, match="could not be decoded"):
        await limited.decode(jpeg_of_many_scans(2000, 2000, 20_000), "image_file")
    assert (await limited.decode(GOOD, "image_file") == disc()).all()
    await limited.close()


@pytest.mark.fault(26)
@pytest.mark.parametrize("make", [gif_of_frames, webp_of_frames, apng_of_frames])
async def test_of_ten_thousand_frames_only_the_first_is_decoded(
    decoder: DecoderPool, make: Callable[[int], bytes]
) -> None:
    """The result is the first frame, and the process serves on."""
    decoded = await decoder.decode(make(10_000), "image_file")
    assert decoded.shape == (16, 16, 3)
    assert (decoded == RED).all()
    await same_child_serves_on(decoder)


@pytest.mark.fault(27)
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:0"])
async def test_an_avif_becomes_rgb(decoder: DecoderPool, subsampling: str) -> None:
    """With EXTRA_IMAGE_FORMATS."""
    decoded = await decoder.decode(file_of(disc(), "AVIF", quality=95, subsampling=subsampling), "image_file")
    assert decoded.shape == disc().shape
    assert np.abs(decoded.astype(int) - disc()).mean() < 4


@pytest.mark.fault(27)
async def test_an_avif_of_ten_bits_becomes_rgb(decoder: DecoderPool) -> None:
    """Ten bits are reduced to eight."""
    deep = np.full((32, 32, 3), (50 * 4, 100 * 4, 200 * 4), np.uint16)  # blue first, as in OpenCV
    _, data = cv2.imencode(".avif", deep, [cv2.IMWRITE_AVIF_QUALITY, 98, cv2.IMWRITE_AVIF_DEPTH, 10])
    assert b"pixi\0\0\0\0\x03\x0a\x0a\x0a" in data.tobytes(), "three channels of ten bits"
    decoded = await decoder.decode(data.tobytes(), "image_file")
    assert (decoded.shape, decoded.dtype) == ((32, 32, 3), np.uint8)
    assert np.abs(decoded.astype(int) - (200, 100, 50)).max() <= 3


@pytest.mark.fault(28)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
async def test_exif_that_refers_to_itself_ends(decoder: DecoderPool, kind: str) -> None:
    """The image is decoded, rotated or not, and the process serves on."""
    exif, picture = exif_that_loops(), disc(96, 80)
    data = (
        jpeg_with(b"\xff\xe1", exif, file_of(picture, "JPEG")) if kind == "JPEG" else file_of(picture, kind, exif=exif)
    )
    decoded = await decoder.decode(data, "image_file")
    assert sorted(decoded.shape) == [3, 80, 96]
    await same_child_serves_on(decoder)


@pytest.mark.fault(28)
async def test_a_profile_of_ten_megabytes_changes_nothing(decoder: DecoderPool) -> None:
    """Profiles are skipped and not applied."""
    data = jpeg_with_profile(10 * 2**20, file_of(disc(), "JPEG", quality=95))
    assert np.abs((await decoder.decode(data, "image_file")).astype(int) - disc()).mean() < 3
    await same_child_serves_on(decoder)


@pytest.mark.fault(28)
@pytest.mark.parametrize(
    ("kind", "head", "times"), [(b"iCCP", b"profile\0\0", 1), (b"zTXt", b"Comment\0\0", 20)], ids=["profile", "texts"]
)
async def test_what_a_png_says_of_itself_is_not_unpacked_without_bound(
    decoder: DecoderPool, kind: bytes, head: bytes, times: int
) -> None:
    """A hundred megabytes compressed to a tenth of one: refused as broken, in little memory."""
    packed = head + zlib.compress(bytes(100 * 2**20 // times), 1)
    data = GOOD
    for _ in range(times):
        data = png_with(kind, packed, data)
    with pytest.raises(InvalidInput, match="image_file is a broken picture"):
        await decoder.decode(data, "image_file")
    assert await asyncio.to_thread(peak_memory, decoder) < 128 * 2**20
    await same_child_serves_on(decoder)


@pytest.mark.fault(31)
@pytest.mark.parametrize("kind", foreign())
async def test_other_kinds_of_files_have_no_decoder(kind: str) -> None:
    """Types that Pillow could read are refused by name, and their decoders are not loaded."""
    decoder = DecoderPool(max_bytes=2**20, max_pixels=2**24, max_side=16_383, processes=1, seconds=60)
    with pytest.raises(UnsupportedMedia, match=r"image_file is not a PNG, JPEG or WebP picture\."):
        await decoder.decode(foreign()[kind], "image_file")
    await same_child_serves_on(decoder)
    await decoder.close()


@pytest.mark.fault(31)
async def test_gif_and_avif_are_taken_where_a_setting_says_so(decoder: DecoderPool) -> None:
    """And the error for other types lists them."""
    assert (await decoder.decode(gif_of_frames(2), "image_file") == RED).all()
    with pytest.raises(UnsupportedMedia, match="PNG, JPEG, WebP, AVIF, BMP, GIF or TIFF"):
        await decoder.decode(foreign()["psd"], "image_file")
