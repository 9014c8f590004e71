"""Every stored image carries IPTC's DigitalSourceType in XMP, unless the operator turned metadata off."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from xml.etree import ElementTree

import pytest
from conftest import RunningApp
from fakes import disc, file_of
from PIL import Image

pytestmark = pytest.mark.slow

_VOCABULARY = "http://cv.iptc.org/newscodes/digitalsourcetype/"
_GENERATED = _VOCABULARY + "trainedAlgorithmicMedia"
_EDITED = _VOCABULARY + "compositeWithTrainedAlgorithmicMedia"
_PROPERTY = "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType"
_PICTURE = {"image_file": ("a.png", file_of(disc()), "image/png")}


def source_type_in(file: bytes) -> str | None:
    """What an XMP reader finds in an image: Pillow finds the packet, an XML parser the property."""
    with Image.open(io.BytesIO(file)) as image:
        image.load()
        packet = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp") or b""
    text = packet.decode() if isinstance(packet, bytes) else packet
    if not text:
        return None
    found = ElementTree.fromstring(text).find(f".//{_PROPERTY}")  # noqa: S314  # our own output
    return None if found is None else found.text


def stored_files(running_app: RunningApp) -> list[bytes]:
    """Every object in the local bucket."""
    folder = running_app.folder / "bucket" / "objects"
    return [path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()]


@pytest.mark.fault(170)
@pytest.mark.parametrize("embedded", ["full", "digest"])
@pytest.mark.parametrize("file_format", ["webp", "png", "jpeg"])
def test_a_drawn_picture_is_marked_as_generated(
    run_app: Callable[..., RunningApp], file_format: str, embedded: str
) -> None:
    """In every format, with the whole record or only the digest, lossless or not."""
    running_app = run_app(embed_metadata=embedded)
    for quality in (80, 100):
        answer = running_app.draw(prompt=f"a red square {quality}", format=file_format, quality=quality)
        assert answer.status_code == 200
    files = stored_files(running_app)
    assert len(files) == 2
    assert [source_type_in(file) for file in files] == [_GENERATED] * 2


@pytest.mark.fault(170)
@pytest.mark.parametrize("file_format", ["webp", "png", "jpeg"])
def test_metadata_turned_off_leaves_no_mark(run_app: Callable[..., RunningApp], file_format: str) -> None:
    """EMBED_METADATA=none stores pixels alone."""
    running_app = run_app(embed_metadata="none")
    assert running_app.draw(prompt="a red square", format=file_format).status_code == 200
    (file,) = stored_files(running_app)
    assert source_type_in(file) is None
    assert b"iptc" not in file.lower()


@pytest.mark.fault(170)
@pytest.mark.parametrize("path", ["/style_transfer_and_upload_image", "/style_transfer_bytes_and_upload_image"])
def test_a_picture_made_from_a_picture_is_marked_as_edited(running_app: RunningApp, path: str) -> None:
    """Image to image, in every way to send the input."""
    answer = running_app.client.post(path, data={"prompt": "a red square", "canny": "false"}, files=_PICTURE)
    assert answer.status_code == 200, answer.text
    (file,) = stored_files(running_app)
    assert source_type_in(file) == _EDITED


@pytest.mark.fault(170)
def test_an_inpainted_picture_is_marked_as_edited(running_app: RunningApp) -> None:
    """The pixels outside the mask are a photograph's."""
    mask = {"mask_file": ("m.png", file_of(disc()), "image/png")}
    answer = running_app.client.post(
        "/inpaint_and_upload_image", data={"prompt": "a red square"}, files={**_PICTURE, **mask}
    )
    assert answer.status_code == 200, answer.text
    (file,) = stored_files(running_app)
    assert source_type_in(file) == _EDITED


@pytest.mark.fault(170)
def test_the_dialects_and_direct_answers_are_marked_too(running_app: RunningApp) -> None:
    """/make_image, OpenAI's base64 and AUTOMATIC1111's base64 return files with the mark."""
    asked = {"prompt": "a red square", "width": 64, "height": 64}
    direct = running_app.client.post("/make_image", json=asked).content
    openai = running_app.client.post(
        "/v1/images/generations", json={"prompt": "a red square", "size": "64x64", "response_format": "b64_json"}
    )
    webui = running_app.client.post("/sdapi/v1/txt2img", json=asked)
    files = [
        direct,
        base64.b64decode(openai.json()["data"][0]["b64_json"]),
        base64.b64decode(webui.json()["images"][0]),
    ]
    assert [source_type_in(file) for file in files] == [_GENERATED] * 3
    edited = running_app.client.post(
        "/sdapi/v1/img2img", json={**asked, "init_images": [base64.b64encode(file_of(disc())).decode()]}
    )
    assert source_type_in(base64.b64decode(edited.json()["images"][0])) == _EDITED
