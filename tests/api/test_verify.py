"""`POST /v1/verify`: who made an image, whether it is intact, and what the history may tell of it."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest
from conftest import RunningApp
from fakes import disc, file_of
from test_marking import stored_files

from stable_diffusion_server.app.credentials import make_certificate
from stable_diffusion_server.imaging import ContentSigner, encode_image
from stable_diffusion_server.types import Format

pytest.importorskip("c2pa")
pytestmark = pytest.mark.slow


def verified(app: RunningApp, file: bytes, **headers: str) -> httpx.Response:
    """The answer about a file."""
    return app.client.post("/v1/verify", files={"image_file": ("a", file, "image/png")}, headers=headers)


def foreign(file_format: Format = Format.PNG) -> bytes:
    """A file that another server signed, whose certificate has our names."""
    key, mark, chain = make_certificate().partition(b"-----BEGIN CERTIFICATE-----")
    signer = ContentSigner()
    signer.open(mark + chain, key)
    source = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
    action = {"action": "c2pa.created", "digitalSourceType": source, "parameters": {"digest": "0" * 64}}
    manifest = {
        "claim_generator_info": [{"name": "Stable Diffusion Server", "version": "1"}],
        "assertions": [{"label": "c2pa.actions.v2", "data": {"actions": [action]}}],
    }
    return signer.sign(encode_image(np.asarray(disc()), file_format, 90, None), file_format, manifest)


@pytest.mark.parametrize("file_format", ["png", "jpeg", "webp"])
def test_a_picture_made_here_is_ours_and_known(running_app: RunningApp, file_format: str) -> None:
    """With its model, and the key and address in the history."""
    drawn = running_app.draw(prompt="a red square", format=file_format, save_path=f"a.{file_format}").json()
    (file,) = stored_files(running_app)
    body = verified(running_app, file).json()
    assert (body["made_by"], body["intact"]) == ("ours", True)
    assert body["manifests"][0]["actions"][0]["software"] == drawn["model"]
    assert len(body["certificate_sha256"]) == 64
    for _ in range(100):  # the history is written in the background
        if body["history"]:
            break
        body = verified(running_app, file).json()
    assert body["history"]["key"] == drawn["key"]
    assert running_app.client.get(body["history"]["url"]).content == file


def test_another_servers_picture_is_anothers_whatever_its_names_say(running_app: RunningApp) -> None:
    """Same common name, issuer and generator; nothing of the history is told for its digest."""
    body = verified(running_app, foreign()).json()
    assert (body["made_by"], body["intact"], body["history"]) == ("anothers", True, None)
    assert body["manifests"][0]["generator"] == "Stable Diffusion Server"


def test_a_changed_picture_is_tampered(running_app: RunningApp) -> None:
    """One bit of it."""
    running_app.draw(prompt="a red square", format="jpeg")
    file = bytearray(*stored_files(running_app))
    file[-40] ^= 1
    body = verified(running_app, bytes(file)).json()
    assert (body["made_by"], body["intact"], body["history"]) == ("tampered", False, None)
    assert "assertion.dataHash.mismatch" in body["failures"]


def test_a_picture_without_credentials_has_none(running_app: RunningApp) -> None:
    """And nothing is said about whether it is intact."""
    body = verified(running_app, file_of(disc())).json()
    assert (body["made_by"], body["intact"], body["manifests"], body["history"]) == ("none", None, [], None)


def test_an_edit_of_anothers_picture_is_ours_and_names_it(running_app: RunningApp) -> None:
    """Both manifests are told."""
    files = {"image_file": ("a.png", foreign(), "image/png")}
    data = {"prompt": "a red square", "canny": "false"}
    assert running_app.client.post("/style_transfer_and_upload_image", data=data, files=files).status_code == 200
    (file,) = stored_files(running_app)
    body = verified(running_app, file).json()
    assert (body["made_by"], body["intact"]) == ("ours", True)
    mine, theirs = body["manifests"]
    assert mine["ingredients"][0]["active_manifest"] == theirs["label"]


def test_only_who_may_read_the_record_hears_of_the_history(run_app: Callable[..., RunningApp]) -> None:
    """To another key the picture is ours, and no more."""
    running_app = run_app(api_keys="ann:secret-a, bob:secret-b")
    running_app.client.headers["authorization"] = "Bearer secret-a"
    assert running_app.draw(prompt="a red square").status_code == 200
    (file,) = stored_files(running_app)
    body: dict[str, Any] = {}
    for _ in range(100):
        body = verified(running_app, file).json()
        if body["history"]:
            break
    assert body["history"]["model"]
    other = verified(running_app, file, authorization="Bearer secret-b").json()
    assert (other["made_by"], other["history"]) == ("ours", None)
    assert verified(running_app, file, authorization="Bearer wrong").status_code == 401


def test_what_is_no_picture_is_refused_by_name(running_app: RunningApp) -> None:
    """Nothing, both, another format, too many bytes, a private address."""
    client = running_app.client
    assert client.post("/v1/verify", data={}).status_code == 422
    both = client.post("/v1/verify", data={"image_url": "http://a.example/"}, files={"image_file": io.BytesIO(b"a")})
    assert both.status_code == 422
    refused = verified(running_app, b"GIF89a")
    assert (refused.status_code, refused.json()["field"]) == (415, "image_file")
    inside = client.post("/v1/verify", data={"image_url": "http://127.0.0.1:9/a.png"})
    assert (inside.status_code, inside.json()["field"]) == (422, "image_url")
