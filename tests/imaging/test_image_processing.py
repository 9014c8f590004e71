"""Image functions: canvas sizes, exact output size, encoding with metadata."""

import io
import json
import time
import tracemalloc
from collections.abc import Callable

import numpy as np
import PIL
import pytest
from fakes import disc, file_of
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from stable_diffusion_server.imaging.canvas import Canvas, crop_to_size, plan_canvas, to_canvas
from stable_diffusion_server.imaging.edges import canny
from stable_diffusion_server.imaging.encode import encode_image
from stable_diffusion_server.imaging.masks import feather_mask, paste_back, to_mask
from stable_diffusion_server.types import Format

RECORD = {"prompt": "ein grünes Herz 💚", "seed": 7, "num_inference_steps": 4, "width": 60, "height": 40}


def picture(width: int = 60, height: int = 40) -> np.ndarray:
    """Colours that identify each pixel's position."""
    rows, columns = np.mgrid[0:height, 0:width]
    return np.stack([rows * 255 // height, columns * 255 // width, rows * 0 + 128], -1).astype(np.uint8)


@pytest.mark.parametrize(
    ("asked", "canvas"),
    [
        ((256, 256), Canvas(256, 256, resampled=False)),
        ((200, 130), Canvas(256, 192, resampled=False)),
        ((257, 256), Canvas(256, 256, resampled=True)),
        ((1024, 1024), Canvas(256, 256, resampled=True)),
        ((64, 64), Canvas(256, 256, resampled=True)),
        ((128, 128), Canvas(128, 128, resampled=False)),
        ((127, 128), Canvas(128, 128, resampled=False)),
        ((2048, 64), Canvas(512, 128, resampled=True)),
        ((600, 400), Canvas(320, 192, resampled=True)),
    ],
)
def test_the_canvas_is_aligned_and_within_the_models_budget(asked: tuple[int, int], canvas: Canvas) -> None:
    """Within the pixel budget: the next multiple of 64 up, not resampled.

    Beyond it or below the minimum: a native size.
    """
    assert plan_canvas(*asked, native_pixels=256 * 256, min_side=128) == canvas


@given(st.integers(64, 2048), st.integers(64, 2048), st.sampled_from([128, 256, 512, 1024]))
@example(154, 1615, 512)
@settings(deadline=None)
def test_every_size_has_a_canvas_that_can_be_cropped_to_it(width: int, height: int, native: int) -> None:
    """Every requested size works, no canvas exceeds the budget, and the output has exactly that size."""
    canvas = plan_canvas(width, height, native * native, min_side=128)
    assert canvas.width * canvas.height <= native * native
    assert min(canvas.width, canvas.height) >= 128
    assert canvas.width % 64 == canvas.height % 64 == 0
    drawn = np.zeros((canvas.height, canvas.width, 3), np.uint8)
    assert crop_to_size(drawn, width, height, resample=canvas.resampled).shape == (height, width, 3)


def test_a_crop_is_centred_and_changes_no_pixel() -> None:
    """Without resampling the output is a window of the canvas, with equal borders on both sides."""
    drawn = picture(64, 64)
    assert np.array_equal(crop_to_size(drawn, 60, 40, resample=False), drawn[12:52, 2:62])


def test_resampling_keeps_the_aspect_ratio() -> None:
    """A square on a square canvas stays a square in an oblong output."""
    drawn = np.zeros((128, 128, 3), np.uint8)
    drawn[48:80, 48:80] = 255
    white = crop_to_size(drawn, 512, 256, resample=True)[..., 0] > 128
    assert abs(int(white.any(0).sum()) - int(white.any(1).sum())) <= 2


@pytest.mark.parametrize(("file_format", "kind"), [(Format.WEBP, "WEBP"), (Format.PNG, "PNG"), (Format.JPEG, "JPEG")])
def test_a_file_is_of_the_format_asked_for_and_close_to_the_pixels(file_format: Format, kind: str) -> None:
    """Each format decodes to the requested size and nearly the same pixels."""
    image = Image.open(io.BytesIO(encode_image(picture(), file_format, 90, None)))
    assert (image.format, image.size) == (kind, (60, 40))
    assert np.abs(np.asarray(image.convert("RGB")).astype(int) - picture()).mean() < 6


@pytest.mark.parametrize(("file_format", "quality"), [(Format.PNG, 1), (Format.WEBP, 100)])
def test_lossless_formats_keep_every_pixel(file_format: Format, quality: int) -> None:
    """PNG always, WebP at quality 100."""
    image = Image.open(io.BytesIO(encode_image(picture(), file_format, quality, None)))
    assert np.array_equal(np.asarray(image.convert("RGB")), picture())


@pytest.mark.parametrize("file_format", [Format.WEBP, Format.JPEG])
def test_the_record_comes_back_out_of_the_exif(file_format: Format) -> None:
    """WebP and JPEG carry the record as a Unicode user comment, including emoji and umlauts."""
    image = Image.open(io.BytesIO(encode_image(picture(), file_format, 85, RECORD)))
    comment = image.getexif().get_ifd(0x8769)[0x9286]
    assert comment.startswith(b"UNICODE\0")
    assert json.loads(comment[8:].decode("utf-16-be")) == RECORD


def test_a_png_carries_the_record_as_automatic1111_reads_it() -> None:
    """The `parameters` chunk starts with the prompt and names steps, seed and size."""
    image = Image.open(io.BytesIO(encode_image(picture(), Format.PNG, 85, RECORD)))
    assert image.text["parameters"] == "ein grünes Herz 💚\nSteps: 4, Seed: 7, Size: 60x40"
    assert json.loads(image.text["record"]) == RECORD


@pytest.mark.parametrize("file_format", list(Format))
def test_without_a_record_nothing_is_written_beside_the_pixels(file_format: Format) -> None:
    """EMBED_METADATA=none writes no metadata."""
    image = Image.open(io.BytesIO(encode_image(picture(), file_format, 85, None)))
    assert not image.getexif()
    assert not getattr(image, "text", {})


def test_pillow_is_not_older_than_the_release_that_mends_its_jpeg_decoder() -> None:
    """13.0.0 closes a critical heap overflow; an older version must not be resolved by accident."""
    assert int(PIL.__version__.split(".")[0]) >= 13


def test_encoding_ends() -> None:
    """An image of the largest size is encoded; the bound only catches a hang."""
    started = time.monotonic()
    encode_image(np.zeros((2048, 2048, 3), np.uint8), Format.WEBP, 85, RECORD)
    assert time.monotonic() - started < 60


@given(st.integers(1, 700), st.integers(1, 700))
@settings(max_examples=60, deadline=None)
def test_a_picture_laid_on_its_canvas_comes_back_at_its_size_and_place(width: int, height: int) -> None:
    """`to_size` is the inverse of `to_canvas`: exactly without scaling, approximately with it."""
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x * 255 // width, y * 255 // height, (x + y) * 127 // (width + height)], 2).astype(np.uint8)
    canvas = plan_canvas(width, height, 256 * 256, 128)
    laid = to_canvas(pixels, canvas)
    assert laid.shape == (canvas.height, canvas.width, 3)
    back = crop_to_size(laid, width, height, resample=canvas.resampled)
    assert back.shape == pixels.shape
    if not canvas.resampled:
        assert (back == pixels).all()
    elif 1 / 4 < width / height < 4 and min(width, height) > 64:
        assert np.abs(back.astype(int) - pixels).mean() < 4


def test_beyond_a_picture_its_border_is_drawn_out_and_a_mask_keeps() -> None:
    """A canvas larger than the image repeats the border pixels.

    The mask is 0 there, so nothing is repainted needlessly.
    """
    pixels = np.full((100, 128, 3), 77, np.uint8)
    canvas = plan_canvas(128, 100, 128 * 128, 128)
    assert (to_canvas(pixels, canvas) == 77).all()
    mask = to_canvas(np.full((100, 128), 255, np.uint8), canvas, fill=0)
    assert mask.sum() == 255 * 100 * 128


def test_canny_finds_the_rim_of_a_disc_and_nothing_else() -> None:
    """White within two pixels of the edge, black elsewhere, equal in three channels.

    Weak edges depend on the threshold.
    """
    edges = canny(disc(128, 128))
    y, x = np.mgrid[:128, :128]
    off_rim = np.abs(np.hypot(x - 64, y - 64) - 32) > 2
    assert set(np.unique(edges)) == {0, 255}
    assert edges.shape == (128, 128, 3)
    assert (edges[..., 0] == edges[..., 2]).all()
    assert not edges[off_rim].any()
    assert (edges[..., 0] > 0).sum() > 0.8 * 2 * np.pi * 32
    assert not canny(np.full((64, 64, 3), 99, np.uint8)).any()
    faint = np.where(disc(64, 64)[..., :1] > 100, np.uint8(109), np.uint8(99)).repeat(3, 2)
    assert not canny(faint).any()
    assert canny(faint, 10, 20).any()


@pytest.mark.fault(29)
@pytest.mark.parametrize("size", [(10, 10), (64, 48), (300, 200)])
def test_a_mask_of_any_size_comes_to_the_size_of_the_picture(size: tuple[int, int]) -> None:
    """White stays white and black stays black, at any mask size."""
    mask = np.zeros((size[1], size[0], 3), np.uint8)
    mask[:, : size[0] // 2] = 255
    fitted = to_mask(mask, 64, 48)
    assert (fitted.shape, fitted.dtype) == ((48, 64), np.uint8)
    assert (fitted[:, :26] == 255).all()
    assert (fitted[:, 38:] == 0).all()


def test_a_mask_that_was_a_jpeg_is_black_and_white_all_the_same() -> None:
    """Compression noise near black and white is removed; greys keep their order."""
    exact = np.zeros((64, 64, 3), np.uint8)
    exact[19:45, 21:43] = 255
    smeared = np.asarray(Image.open(io.BytesIO(file_of(exact, "JPEG", quality=85))))
    assert len(np.unique(smeared)) > 2
    assert (to_mask(smeared, 64, 64) == exact[..., 0]).all()
    ramp = to_mask(np.arange(256, dtype=np.uint8)[None, :, None].repeat(3, 2), 256, 1)[0].astype(int)
    assert (np.diff(ramp) >= 0).all()
    assert (ramp[0], ramp[32], ramp[223], ramp[255]) == (0, 0, 255, 255)


def test_a_feathered_mask_rises_inwards_and_never_leaves_the_mask() -> None:
    """Where the mask is 0 the feathered one is 0; it rises from the border; far inside it equals the mask."""
    mask = np.zeros((60, 60), np.uint8)
    mask[10:50, 10:50] = 255
    soft = feather_mask(mask, 8)
    assert not soft[mask == 0].any()
    assert (np.diff(soft[30, 10:20].astype(int)) >= 0).all()
    assert 0 < soft[30, 10] < 64
    assert soft[30, 30] == 255
    assert (feather_mask(mask, 0) == mask).all()


@pytest.mark.parametrize("level", [0, 1, 128, 254, 255])
@pytest.mark.parametrize("size", [(64, 900), (200, 300), (1030, 64)])
def test_masks_of_any_level_are_blended_in_little_memory(level: int, size: tuple[int, int]) -> None:
    """Beside its result, blending takes a band of rows, and feathering one float for each pixel, for grey masks too."""
    width, height = size
    mask = np.full((height, width), level, np.uint8)
    drawn, image = np.random.default_rng(level).integers(0, 256, (2, height, width, 3), dtype=np.uint8)
    band = 64 * width * 3 * 2 * 5
    assert _peak(lambda: paste_back(drawn, image, mask)) <= image.nbytes + band
    assert _peak(lambda: feather_mask(mask, 4)) <= 6.5 * mask.nbytes + 10_000


def _peak(work: Callable[[], object]) -> int:
    """Return the bytes that were allocated at a time."""
    work()
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_pasting_back_keeps_every_unmasked_pixel_and_takes_every_masked_one(seed: int) -> None:
    """Exactly, for any two images; at grey mask values each channel lies between the two."""
    chance = np.random.default_rng(seed)
    drawn, image = chance.integers(0, 256, (2, 20, 30, 3), dtype=np.uint8)
    mask = chance.choice(np.array([0, 1, 128, 254, 255], np.uint8), (20, 30))
    result = paste_back(drawn, image, mask)
    assert (result[mask == 0] == image[mask == 0]).all()
    assert (result[mask == 255] == drawn[mask == 255]).all()
    assert ((result >= np.minimum(drawn, image)) & (result <= np.maximum(drawn, image))).all()
    half = mask == 128
    expected = (drawn[half].astype(float) * 128 + image[half].astype(float) * 127) / 255
    assert np.abs(result[half] - expected).max() <= 0.5
