"""Google service account keys: tokens from a loopback server, URLs signed locally."""

from __future__ import annotations

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from storage_servers import StorageServer, gcs_options, make_gcs_bucket, opened

from stable_diffusion_server.errors import StorageUnavailable
from stable_diffusion_server.storage.factory import open_bucket

BARE = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


@pytest.fixture(params=[200])
def tokens(request: pytest.FixtureRequest) -> Iterator[str]:
    """URL of a server that issues tokens, or refuses with another status."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            good = {"access_token": "token", "expires_in": 3600, "token_type": "Bearer"}
            body = json.dumps(good if request.param == 200 else {"error": "invalid_grant"}).encode()
            self.send_response(request.param)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/token"
    server.shutdown()
    server.server_close()


def key_file(folder: Path, token_uri: str) -> Path:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048).private_bytes(*BARE).decode()
    facts = {"type": "service_account", "project_id": "p", "private_key_id": "1", "private_key": key}
    path = folder / "key.json"
    path.write_text(json.dumps({**facts, "client_email": "draw@p.example", "token_uri": token_uri}))
    return path


def test_a_private_key_signs_addresses(
    tmp_path: Path, tokens: str, gcs_server: StorageServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A V4 signature of the account, for the requested time, over the key encoded once."""
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", gcs_server.url)
    options = gcs_options(
        make_gcs_bucket(gcs_server),
        google_application_credentials=key_file(tmp_path, tokens),
        signed_url_seconds=60,
    )
    url = opened(options).url("a b/猫.webp") or ""
    assert f"/{options.bucket_name}/a%20b/%E7%8C%AB.webp?" in url
    assert "X-Goog-Expires=60" in url
    assert "X-Goog-Signature=" in url


@pytest.mark.parametrize("tokens", [400], indirect=True)
def test_a_key_google_does_not_know_is_reported(
    tmp_path: Path, tokens: str, gcs_server: StorageServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No token, no bucket, one sentence."""
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", gcs_server.url)
    bucket = open_bucket(gcs_options("pictures", google_application_credentials=key_file(tmp_path, tokens)))
    with pytest.raises(StorageUnavailable, match="does not accept the credentials"):
        bucket.open()


@pytest.mark.parametrize("content", [None, "no json", '{"type": "service_account"}', '{"type": "other"}'])
def test_a_key_file_that_is_none_is_reported(tmp_path: Path, content: str | None) -> None:
    """Absent, broken or of another kind: the error names the setting and does not show the content."""
    path = tmp_path / "key.json"
    if content is not None:
        path.write_text(content)
    bucket = open_bucket(gcs_options("pictures", google_application_credentials=path))
    with pytest.raises(StorageUnavailable, match="GOOGLE_APPLICATION_CREDENTIALS") as raised:
        bucket.open()
    assert "service_account" not in raised.value.detail
