"""Metadata of an input image never reaches a stored or returned image."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
from conftest import RunningApp
from fakes import FakeImageDenoiser, disc, file_of
from hostile_images import SECRET, exif_of_a_place, gif_of_frames, jpeg_with_profile, polyglots
from PIL import Image

pytestmark = pytest.mark.slow

STYLE = "/style_transfer_and_upload_image"
PHOTOGRAPH = jpeg_with_profile(200_000, file_of(disc(), "JPEG", exif=exif_of_a_place()))
BROUGHT = {"a photograph": PHOTOGRAPH, **polyglots()}
GPS = 0x8825


@pytest.mark.fault(22, 28)
@pytest.mark.parametrize("kind", ["webp", "png", "jpeg"])
@pytest.mark.parametrize("brought", BROUGHT)
def test_only_pixels_are_stored(run_app: Callable[..., RunningApp], brought: str, kind: str) -> None:
    """No location, name, profile or embedded file, in any format, even where the image hardly changes."""
    assert SECRET in PHOTOGRAPH
    assert Image.open(io.BytesIO(PHOTOGRAPH)).getexif().get_ifd(GPS)
    running_app = run_app(FakeImageDenoiser())
    asked = {"prompt": "a red square", "strength": "0.3", "save_path": f"out.{kind}"}
    answer = running_app.client.post(STYLE, data=asked, files={"image_file": ("photo.jpg", BROUGHT[brought])})
    assert answer.status_code == 200, answer.text
    files = [path.read_bytes() for path in (running_app.folder / "bucket").rglob("*") if path.is_file()]
    assert not [data for data in files if SECRET in data or b"index.html" in data]
    stored = Image.open(io.BytesIO(running_app.client.get(answer.json()["path"]).content))
    assert stored.format == kind.upper()
    assert not stored.getexif().get_ifd(GPS)
    assert "icc_profile" not in stored.info


@pytest.mark.fault(31)
def test_more_kinds_are_taken_where_a_setting_names_them(run_app: Callable[..., RunningApp]) -> None:
    """GIF, AVIF, BMP and TIFF with EXTRA_IMAGE_FORMATS; without it they are 415."""
    for changes, status in (({}, 415), ({"extra_image_formats": "gif,avif,bmp,tiff"}, 200)):
        running_app = run_app(FakeImageDenoiser(), **changes)
        for data in (gif_of_frames(2), *(file_of(disc(), kind) for kind in ("AVIF", "BMP", "TIFF"))):
            files = {"image_file": ("odd", data)}
            asked = {"prompt": "a red square", "overwrite": "1"}
            assert running_app.client.post(STYLE, data=asked, files=files).status_code == status
