"""A server starts with any bucket fault, reports it at /readyz, and recovers by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeDenoiser, settings_in, until
from fastapi.testclient import TestClient
from storage_servers import (
    KEYS,
    MisbehavingStore,
    Said,
    StorageServer,
    free_port,
    make_gcs_bucket,
    make_s3_bucket,
    refused,
)

from stable_diffusion_server.app import create_app

pytestmark = pytest.mark.slow

ORDER = {"prompt": "a red square", "width": 64, "height": 64, "save_path": "a.webp"}
HTML = Said(200, b"<html>Log in to the network</html>", {"Content-Type": "text/html"})
XML = {"Content-Type": "application/xml"}
# The initial response to every request.
BROKEN: dict[str, str | Said] = {
    "reset": "close",
    "half an answer": "reset",
    "no HTTP": "noise",
    "silence": "slow",
    "HTML": HTML,
    "HTML with status 403": Said(403, HTML.content, HTML.headers),
    "HTML with status 404": Said(404, HTML.content, HTML.headers),
    "status 500": refused("InternalError", 500),
    "nothing at all": Said(200),
    "no body of an error": Said(403),
    "wrong XML": Said(200, b"<?xml version='1.0'?><Answer><Of>another</Of></Answer>", XML),
    "broken XML": Said(400, b"<Error><Code>Acc", XML),
    "a redirect": Said(302, b"", {"Location": "http://127.0.0.1:9/"}),
    "no such bucket": refused("NoSuchBucket", 404),
    "expired credentials": refused("ExpiredToken", 400),
}

MakeServer = Callable[..., TestClient]


@pytest.fixture
def server_of(tmp_path: Path) -> Iterator[MakeServer]:
    """Start a server over a bucket, ready or not."""
    running: list[TestClient] = []

    def start(**changes: Any) -> TestClient:
        settings = settings_in(tmp_path, storage_timeout=2.0, **changes)
        app = create_app(settings, load=lambda settings: FakeDenoiser())
        running.append(TestClient(app, base_url="http://127.0.0.1", client=("127.0.0.1", 5)).__enter__())
        return running[-1]

    yield start
    for client in running:
        client.__exit__(None, None, None)


def s3_settings(url: str, name: str) -> dict[str, Any]:
    keys = {key: value.get_secret_value() for key, value in KEYS.items()}
    return {"storage_provider": "r2", "bucket_name": name, "r2_endpoint_url": url, **keys}


def starts_and_recovers(client: TestClient, rascal: MisbehavingStore) -> None:
    """Alive; not ready with one sentence and no traceback; its images are spooled, and uploaded after recovery."""
    until(lambda: client.get("/readyz").json()["missing"] not in ([], ["The models are loading."]), 60)
    assert client.get("/healthz").status_code == 200
    unready = client.get("/readyz")
    [sentence] = unready.json()["missing"]
    assert (unready.status_code, sentence.startswith("The"), "Traceback" in sentence) == (503, True, False)
    drawn = client.post("/create_and_upload_image", json=ORDER)
    assert (drawn.status_code, drawn.json()["stored"]) == (200, False), drawn.text
    rascal.rule = lambda method, path, headers: ""
    rascal.release.set()
    until(lambda: client.get("/readyz").status_code == 200, 90)
    until(lambda: client.post("/create_and_upload_image", json=ORDER).json()["stored"], 90)


@pytest.mark.fault(136)
@pytest.mark.parametrize("kind", BROKEN)
def test_a_server_starts_while_its_s3_bucket_is_broken(
    server_of: MakeServer,
    s3_server: StorageServer,
    rascal_before: Callable[[StorageServer], MisbehavingStore],
    kind: str,
) -> None:
    """In fifteen ways; recovery needs no operator."""
    rascal = rascal_before(s3_server)
    rascal.rule = lambda method, path, headers: BROKEN[kind]
    starts_and_recovers(server_of(**s3_settings(rascal.url, make_s3_bucket(s3_server))), rascal)


@pytest.mark.fault(136)
@pytest.mark.parametrize("kind", ["reset", "no HTTP", "silence", "HTML", "status 500", "nothing at all", "wrong XML"])
def test_a_server_starts_while_its_google_bucket_is_broken(
    server_of: MakeServer,
    gcs_server: StorageServer,
    rascal_before: Callable[[StorageServer], MisbehavingStore],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    """The same for Google's client library."""
    rascal = rascal_before(gcs_server)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", rascal.url)
    rascal.rule = lambda method, path, headers: BROKEN[kind]
    starts_and_recovers(server_of(storage_provider="gcs", bucket_name=make_gcs_bucket(gcs_server)), rascal)


@pytest.mark.fault(136)
@pytest.mark.parametrize("where", ["nobody listens", "no TLS where TLS is asked for", "no such host"])
def test_a_server_starts_while_its_bucket_cannot_be_reached(
    server_of: MakeServer, s3_server: StorageServer, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Connection refused, no TLS handshake, no DNS name; also with boto3 settings that name missing files."""
    monkeypatch.setenv("AWS_CA_BUNDLE", "/no/such/bundle.pem" if where == "no such host" else "")
    url = {
        "nobody listens": f"http://127.0.0.1:{free_port()}",
        "no TLS where TLS is asked for": s3_server.url.replace("http:", "https:"),
        "no such host": "https://no-such-host.invalid",
    }[where]
    client = server_of(**s3_settings(url, "pictures"))
    until(lambda: client.get("/readyz").json()["missing"] not in ([], ["The models are loading."]), 60)
    assert client.get("/readyz").status_code == 503
    assert client.get("/healthz").status_code == 200
    assert client.post("/create_and_upload_image", json=ORDER).json()["stored"] is False
