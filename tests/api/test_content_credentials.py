"""Stored images carry signed Content Credentials (C2PA), read back by the c2pa reader itself."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import RunningApp
from fakes import disc, file_of
from PIL import Image
from test_marking import source_type_in, stored_files

from stable_diffusion_server.imaging import read_record

c2pa = pytest.importorskip("c2pa")
pytestmark = pytest.mark.slow

_VOCABULARY = "http://cv.iptc.org/newscodes/digitalsourcetype/"
_OFFLINE = {"verify": {"remote_manifest_fetch": False, "ocsp_fetch": False}}
FORMATS = ["webp", "png", "jpeg"]


def read_credentials(file: bytes) -> tuple[str, dict[str, Any]]:
    """The reader's verdict on a file, and its active manifest."""
    with Image.open(io.BytesIO(file)) as image:
        media_type = str(image.get_format_mimetype())
    context = c2pa.Context(c2pa.Settings.from_json(json.dumps(_OFFLINE)))
    store = json.loads(c2pa.Reader(media_type, io.BytesIO(file), context=context).json())
    return store["validation_state"], store["manifests"][store["active_manifest"]]


def actions_of(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """The actions of a manifest, in order."""
    (found,) = [part for part in manifest["assertions"] if part["label"] == "c2pa.actions.v2"]
    return list(found["data"]["actions"])


@pytest.mark.parametrize("file_format", FORMATS)
def test_a_drawn_picture_is_signed_as_created(run_app: Callable[..., RunningApp], file_format: str) -> None:
    """The reader finds it valid: made by the model of this digest, by trained media, with its metadata unharmed."""
    running_app = run_app()
    answer = running_app.draw(prompt="a red square", format=file_format)
    assert answer.status_code == 200, answer.text
    (file,) = stored_files(running_app)
    state, manifest = read_credentials(file)
    assert state == "Valid"
    (made,) = actions_of(manifest)
    record = read_record(file)
    assert record is not None
    assert made["action"] == "c2pa.created"
    assert made["digitalSourceType"] == source_type_in(file) == _VOCABULARY + "trainedAlgorithmicMedia"
    assert made["softwareAgent"] == {"name": record["model"], "version": record["revision"]}
    assert made["parameters"] == {"digest": record["digest"], "prompt": "a red square"}
    assert manifest["claim_generator_info"][0]["name"] == "Stable Diffusion Server"
    assert "thumbnail" not in manifest


@pytest.mark.parametrize("file_format", FORMATS)
def test_one_flipped_byte_anywhere_in_the_pixels_makes_it_invalid(running_app: RunningApp, file_format: str) -> None:
    """At every 97th byte after the metadata, whichever place it is."""
    running_app.draw(prompt="a red square", format=file_format)
    (file,) = stored_files(running_app)
    start = {"png": b"IDAT", "jpeg": b"\xff\xda", "webp": b"VP8 "}[file_format]
    first = file.index(start) + 16
    end = (
        len(file) - 16 if file_format != "webp" else first + int.from_bytes(file[first - 12 : first - 8], "little") - 9
    )
    places = range(first, end, max(1, (end - first) // 12))
    assert len(places) >= 12
    invalid = 0
    for place in places:
        broken = bytearray(file)
        broken[place] ^= 1
        try:
            state, _ = _credentials_as(bytes(broken), f"image/{file_format}")
        except c2pa.C2paError:
            continue  # the file is no longer one of its format
        assert state == "Invalid", place
        invalid += 1
    assert invalid >= 10


def _credentials_as(file: bytes, media_type: str) -> tuple[str, dict[str, Any]]:
    context = c2pa.Context(c2pa.Settings.from_json(json.dumps(_OFFLINE)))
    store = json.loads(c2pa.Reader(media_type, io.BytesIO(file), context=context).json())
    return store["validation_state"], store


def test_the_stored_bytes_are_the_answer(running_app: RunningApp) -> None:
    """A second request gets the stored file, and the address answers with its ETag: nothing is signed again."""
    first = running_app.client.post("/make_image", data={"prompt": "a red square", "save_path": "a.png"})
    again = running_app.client.post("/make_image", data={"prompt": "a red square", "save_path": "a.png"})
    assert first.content == again.content == stored_files(running_app)[0]
    url = running_app.draw(prompt="a red square", save_path="b.png").json()["path"]
    got = running_app.client.get(url)
    assert running_app.client.get(url, headers={"If-None-Match": got.headers["etag"]}).status_code == 304


def test_a_replay_compares_pixels_so_another_signature_is_equal(running_app: RunningApp) -> None:
    """The new file differs in its signature alone."""
    running_app.draw(prompt="a red square", format="png")
    (file,) = stored_files(running_app)
    answer = running_app.client.post("/v1/replay", files={"picture_file": ("a.png", file, "image/png")})
    assert answer.json()["replay"]["equal"] is True, answer.text
    files = stored_files(running_app)
    assert len(set(files)) == 2
    assert {read_credentials(each)[0] for each in files} == {"Valid"}


@pytest.mark.parametrize(
    "changes", [{"content_credentials": "off"}, {"embed_metadata": "none"}], ids=["off", "no metadata"]
)
@pytest.mark.parametrize("file_format", FORMATS)
def test_nothing_is_signed_where_it_is_off(
    run_app: Callable[..., RunningApp], changes: dict[str, str], file_format: str
) -> None:
    """Neither a manifest nor a certificate is made."""
    running_app = run_app(**changes)
    assert running_app.draw(prompt="a red square", format=file_format).status_code == 200
    (file,) = stored_files(running_app)
    assert b"c2pa" not in file
    assert not (running_app.folder / "data" / "content-credentials.pem").exists()


def test_the_prompt_is_signed_only_where_all_metadata_are_written(run_app: Callable[..., RunningApp]) -> None:
    """EMBED_METADATA=digest leaves it out of the manifest too."""
    running_app = run_app(embed_metadata="digest")
    running_app.draw(prompt="a secret square")
    (file,) = stored_files(running_app)
    (made,) = actions_of(read_credentials(file)[1])
    assert set(made["parameters"]) == {"digest"}
    assert b"secret" not in file


def test_the_longest_prompt_can_be_signed(run_app: Callable[..., RunningApp]) -> None:
    """In a JPEG too, whose segments are short."""
    running_app = run_app(max_prompt_characters=30_000)
    answer = running_app.client.post("/make_image", data={"prompt": "é " * 15_000, "format": "jpeg"})
    assert answer.status_code == 200, answer.text
    state, manifest = read_credentials(answer.content)
    assert state == "Valid"
    assert len(actions_of(manifest)[0]["parameters"]["prompt"]) > 20


def test_pixels_are_the_same_with_and_without(run_app: Callable[..., RunningApp]) -> None:
    """Signing adds a chunk and changes nothing else."""
    pictures = []
    for setting in ("on", "off"):
        running_app = run_app(content_credentials=setting)
        made = running_app.client.post(
            "/make_image", data={"prompt": "a", "format": "png", "save_path": f"{setting}.png"}
        )
        pictures.append(np.asarray(Image.open(io.BytesIO(made.content))))
    assert np.array_equal(*pictures)


@pytest.mark.parametrize("path", ["/style_transfer_and_upload_image", "/upscale_and_upload_image"])
def test_a_picture_made_from_a_picture_is_signed_as_edited(running_app: RunningApp, path: str) -> None:
    """It was opened and then edited; its input is the parent."""
    picture = {"image_file": ("a.png", file_of(disc()), "image/png")}
    data = {} if "upscale" in path else {"prompt": "a red square", "canny": "false"}
    answer = running_app.client.post(path, data=data, files=picture)
    assert answer.status_code == 200, answer.text
    (file,) = stored_files(running_app)
    state, manifest = read_credentials(file)
    assert state == "Valid"
    assert [action["action"] for action in actions_of(manifest)] == ["c2pa.opened", "c2pa.edited"]
    assert [part["relationship"] for part in manifest["ingredients"]] == ["parentOf"]


def test_a_server_makes_one_certificate_and_keeps_it(run_app: Callable[..., RunningApp], tmp_path: Path) -> None:
    """Readable for its user alone, and the same after a restart."""
    for number in range(2):
        running_app = run_app()
        running_app.draw(prompt=f"a red square {number}")
    signatures = [read_credentials(file)[1]["signature_info"] for file in stored_files(running_app)]
    serials = [signature["cert_serial_number"] for signature in signatures]
    kept = tmp_path / "data" / "content-credentials.pem"
    assert kept.stat().st_mode & 0o777 == 0o600
    assert len(serials) == 2
    assert len(set(serials)) == 1


def test_replicas_share_a_certificate_by_setting(run_app: Callable[..., RunningApp], tmp_path: Path) -> None:
    """Certificate and key from files; DATA_DIR gets none."""
    from stable_diffusion_server.app.credentials import make_certificate

    key, mark, chain = make_certificate().partition(b"-----BEGIN CERTIFICATE-----")
    (tmp_path / "chain.pem").write_bytes(mark + chain)
    (tmp_path / "key.pem").write_bytes(key)
    running_app = run_app(credentials_certificate=tmp_path / "chain.pem", credentials_key=tmp_path / "key.pem")
    running_app.draw(prompt="a red square")
    (file,) = stored_files(running_app)
    assert read_credentials(file)[0] == "Valid"
    assert not (tmp_path / "data" / "content-credentials.pem").exists()


def edit_image(app: RunningApp, file: bytes, name: str) -> bytes:
    """The stored file of an edit of a file."""
    data = {"prompt": "a red square", "canny": "false", "save_path": name}
    media_type = "image/webp" if file[:4] == b"RIFF" else "image/png" if file[:4] == b"\x89PNG" else "image/jpeg"
    files = {"image_file": ("a", file, media_type)}
    answer = app.client.post("/style_transfer_and_upload_image", data=data, files=files)
    assert answer.status_code == 200, answer.text
    return app.client.get(answer.json()["path"]).content


@pytest.mark.parametrize("file_format", FORMATS)
def test_an_edit_of_an_edit_keeps_the_credentials_of_both(running_app: RunningApp, file_format: str) -> None:
    """Three manifests in a chain: created, edited, edited again; the reader follows it, in every format."""
    answer = running_app.draw(prompt="a red square", save_path=f"first.{file_format}", format=file_format)
    first = running_app.client.get(answer.json()["path"]).content
    third = edit_image(running_app, edit_image(running_app, first, f"b.{file_format}"), f"c.{file_format}")
    state, store = _credentials_as(third, f"image/{file_format}")
    assert state == "Valid"
    manifest, chain = store["manifests"][store["active_manifest"]], []
    while True:
        chain.append(actions_of(manifest)[-1]["action"])
        if not manifest.get("ingredients"):
            break
        (parent,) = manifest["ingredients"]
        assert not [
            code["code"]
            for code in parent["validation_results"]["activeManifest"]["failure"]
            if code["code"] != "signingCredential.untrusted"
        ]
        manifest = store["manifests"][parent["active_manifest"]]
    assert chain == ["c2pa.edited", "c2pa.edited", "c2pa.created"]
    assert len(store["manifests"]) == 3


def test_an_input_without_credentials_is_an_ingredient_all_the_same(running_app: RunningApp) -> None:
    """It has no manifest of its own."""
    store = _credentials_as(edit_image(running_app, file_of(disc()), "a.png"), "image/png")[1]
    manifest = store["manifests"][store["active_manifest"]]
    (parent,) = manifest["ingredients"]
    assert parent["relationship"] == "parentOf"
    assert parent["format"] == "image/png"
    assert "active_manifest" not in parent


def test_a_tampered_input_is_told_from_an_intact_one(running_app: RunningApp) -> None:
    """Its ingredient says that its credentials do not fit its content."""
    running_app.draw(prompt="a red square", save_path="first.jpeg", format="jpeg")
    tampered = bytearray(*stored_files(running_app))
    tampered[-40] ^= 1
    _, store = _credentials_as(edit_image(running_app, bytes(tampered), "b.png"), "image/png")
    (parent,) = store["manifests"][store["active_manifest"]]["ingredients"]
    codes = [code["code"] for code in parent["validation_results"]["activeManifest"]["failure"]]
    assert "assertion.dataHash.mismatch" in codes
