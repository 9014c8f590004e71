"""Image URLs: the server's, under the host the reader used, or the bucket's; each of them must work."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any
from urllib.parse import urlsplit

import pytest
from conftest import RunningApp
from fakes import FakeDenoiser, until
from storage_servers import KEYS, StorageServer, make_gcs_bucket, make_s3_bucket, s3_client

pytestmark = pytest.mark.slow

CREATE = "/create_and_upload_image"
ORDER: dict[str, Any] = {"prompt": "a red square", "width": 64, "height": 64}
HOSTS = ["localhost:9000", "127.0.0.1:8123", "[::1]:7000", "draw.example", "draw.example:8443", "localhost"]


@pytest.fixture
def running_app(run_app: Callable[..., RunningApp]) -> RunningApp:
    """A server with another host name besides loopback."""
    return run_app(allowed_hosts="draw.example", trusted_proxies="")


def paths_of(running_app: RunningApp, host: str) -> dict[str, str]:
    """Image URL in the response of every kind of request, all sent with one Host."""
    headers, client = {"host": host}, running_app.client
    drawn = client.post(CREATE, json=ORDER, headers=headers).json()
    accepted = client.post(CREATE, json=ORDER, headers={**headers, "prefer": "respond-async"})
    job = accepted.headers["location"]
    until(lambda: client.get(job, headers=headers).json()["state"] == "done")
    events = [line for line in client.get(f"{job}/events", headers=headers).text.splitlines() if "path" in line]
    claimed = {**headers, "idempotency-key": "one-key-for-all-hosts"}
    a1111 = client.post("/sdapi/v1/txt2img", json={**ORDER, "seed": 7}, headers=headers).json()
    images = {"prompt": "a red square", "response_format": "url", "size": "64x64"}
    return {
        "receipt": drawn["path"],
        "picture": client.post("/make_image", json=ORDER, headers=headers).headers["content-location"],
        "job": client.get(job, headers=headers).json()["receipt"]["path"],
        "event": json.loads(events[-1].removeprefix("data: "))["receipt"]["path"],
        "idempotent": client.post(CREATE, json=ORDER, headers=claimed).json()["path"],
        "history": client.get("/history", headers=headers).json()["pictures"][-1]["path"],
        "openai": client.post("/v1/images/generations", json=images, headers=headers).json()["data"][0]["url"],
        "sdapi": json.loads(a1111["info"])["paths"][0],
    }


@pytest.mark.fault(130)
@pytest.mark.parametrize("host", HOSTS)
def test_every_answer_has_the_host_and_port_its_reader_used(running_app: RunningApp, host: str) -> None:
    """Generated under another Host first, so responses are cached, replayed or stored: each has the reader's host."""
    paths_of(running_app, "127.0.0.1:8000")
    reported = paths_of(running_app, host)
    assert {name: urlsplit(path)[:2] for name, path in reported.items()} == dict.fromkeys(reported, ("http", host))
    assert running_app.client.get(reported["receipt"]).content[8:12] == b"WEBP"


@pytest.mark.fault(130)
def test_those_who_share_a_drawing_have_each_their_own_url(run_app: Callable[..., RunningApp]) -> None:
    """Three hosts, one generation, held until all three wait for it."""
    gate = threading.Event()
    running_app = run_app(FakeDenoiser(gate=gate), allowed_hosts="draw.example")
    hosts = ["localhost:9000", "draw.example", "127.0.0.1:8000"]
    with ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(running_app.client.post, CREATE, json=ORDER, headers={"host": host}) for host in hosts]
        until(lambda: bool(running_app.squares.batches))
        gate.set()
        answers = [answer.result(30).json() for answer in asked]
    assert len(running_app.squares.finished) == 1
    assert [urlsplit(answer["path"]).netloc for answer in answers] == hosts
    assert len({answer["key"] for answer in answers}) == 1


@pytest.mark.fault(130)
@pytest.mark.parametrize(
    ("forwarded", "base"),
    [
        ({"x-forwarded-host": "draw.example", "x-forwarded-proto": "https"}, "https://draw.example"),
        ({"x-forwarded-host": "draw.example:8443", "x-forwarded-proto": "https"}, "https://draw.example:8443"),
        ({"x-forwarded-host": "draw.example", "x-forwarded-port": "9000"}, "http://draw.example:9000"),
        ({"x-forwarded-host": "draw.example:1", "x-forwarded-port": "9000"}, "http://draw.example:1"),
        ({"x-forwarded-proto": "https", "x-forwarded-port": "443"}, "https://127.0.0.1:8000"),
        ({"x-forwarded-host": "draw.example", "x-forwarded-port": "80, 9"}, "http://draw.example"),
    ],
)
def test_a_trusted_proxy_tells_what_it_was_reached_at(
    run_app: Callable[..., RunningApp], forwarded: dict[str, str], base: str
) -> None:
    """Host, port and scheme are those the client used; an invalid port is ignored."""
    running_app = run_app(trusted_proxies="127.0.0.1", allowed_hosts="draw.example")
    answer = running_app.client.post(CREATE, json=ORDER, headers={**forwarded, "x-forwarded-for": "127.0.0.1"})
    assert answer.json()["path"].startswith(f"{base}/files/")


@pytest.mark.fault(130)
@pytest.mark.parametrize("header", ["x-forwarded-host", "x-forwarded-port", "x-forwarded-proto"])
def test_a_proxy_without_trust_changes_no_url(run_app: Callable[..., RunningApp], header: str) -> None:
    """The header is ignored, and no client behind it can generate without a key."""
    running_app = run_app(api_keys="k", allowed_hosts="draw.example")
    value = {"x-forwarded-host": "draw.example", "x-forwarded-port": "9000", "x-forwarded-proto": "https"}[header]
    answer = running_app.client.post(CREATE, json=ORDER, headers={header: value, "x-api-key": "k"})
    assert answer.json()["path"].startswith("http://127.0.0.1:8000/files/")


@pytest.mark.fault(130)
def test_a_webhook_names_the_host_that_accepted(run_app: Callable[..., RunningApp]) -> None:
    """A webhook message has no Host of its own, so it uses the one that submitted the job."""
    heard: list[dict[str, Any]] = []

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            heard.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

    server = HTTPServer(("127.0.0.1", 0), Hook)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    port = server.server_address[1]
    running_app = run_app(fetch_allow=f"127.0.0.1:{port}")
    asked = {**ORDER, "webhook_url": f"http://127.0.0.1:{port}/done"}
    running_app.client.post(CREATE, json=asked, headers={"host": "localhost:9000", "prefer": "respond-async"})
    until(lambda: bool(heard))
    server.shutdown()
    server.server_close()
    assert heard[0]["receipt"]["path"].startswith("http://localhost:9000/files/")


@pytest.fixture(params=["r2", "s3", "gcs"])
def without_address(
    request: pytest.FixtureRequest,
    run_app: Callable[..., RunningApp],
    s3_server: StorageServer,
    gcs_server: StorageServer,
    monkeypatch: pytest.MonkeyPatch,
) -> RunningApp:
    """A server whose bucket has no URL: PUBLIC_BASE_URL is not set."""
    if request.param == "gcs":
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", gcs_server.url)
        return run_app(storage_provider="gcs", bucket_name=make_gcs_bucket(gcs_server))
    keys = {key: value.get_secret_value() for key, value in KEYS.items()}
    name = make_s3_bucket(s3_server)
    return run_app(storage_provider=request.param, bucket_name=name, r2_endpoint_url=s3_server.url, **keys)


@pytest.mark.fault(131)
def test_a_bucket_without_an_address_has_its_pictures_given_by_the_server(without_address: RunningApp) -> None:
    """First and cached responses have one URL, which works: whole, range, 304, and HEAD."""
    ask = {**ORDER, "save_path": "folder/a b.webp"}
    first, cached = (without_address.client.post(CREATE, json=ask).json() for _ in range(2))
    url = "http://127.0.0.1:8000/files/static/uploads/folder/a%20b.webp"
    assert (first["path"], cached["path"], cached["cached"]) == (url, url, True)
    get = without_address.client.get
    whole = get(url)
    size, etag = len(whole.content), whole.headers["etag"]
    assert (whole.status_code, whole.headers["content-type"], whole.content[8:12]) == (200, "image/webp", b"WEBP")
    assert whole.headers["cache-control"] == "public, max-age=60"
    for wanted, part in (("0-9", slice(0, 10)), ("-5", slice(size - 5, size)), ("7-", slice(7, size))):
        answer = get(url, headers={"range": f"bytes={wanted}"})
        assert (answer.status_code, answer.content) == (206, whole.content[part])
        assert answer.headers["content-range"].endswith(f"/{size}")
    assert get(url, headers={"range": f"bytes={size}-"}).status_code == 416
    for no_range in ("bytes=5-3", "bytes=-", "lines=1-2", "bytes=0-1,4-5"):
        assert get(url, headers={"range": no_range}).content == whole.content
    assert get(url, headers={"range": "bytes=0-9", "if-range": '"other"'}).content == whole.content
    assert (get(url, headers={"if-none-match": etag}).status_code, get(url).status_code) == (304, 200)
    head = without_address.client.head(url)
    assert (head.content, head.headers["content-length"], head.headers["etag"]) == (b"", str(size), etag)


@pytest.mark.fault(131)
def test_of_such_a_bucket_only_the_servers_own_folder_is_given(
    run_app: Callable[..., RunningApp], s3_server: StorageServer
) -> None:
    """A bucket may hold private objects: only keys below BUCKET_PATH are served."""
    keys = {key: value.get_secret_value() for key, value in KEYS.items()}
    name = make_s3_bucket(s3_server)
    running_app = run_app(storage_provider="s3", bucket_name=name, r2_endpoint_url=s3_server.url, **keys)
    picture = running_app.client.get(
        running_app.client.post(CREATE, json={**ORDER, "save_path": "a.webp"}).json()["path"]
    ).content
    for key in ("secret.webp", "static/secret.webp", "static/uploads.webp"):
        s3_client(s3_server.url).put_object(Bucket=name, Key=key, Body=picture)
        assert running_app.client.get(f"/files/{key}").status_code == 404
    assert running_app.client.get("/files/static/uploads/%2e%2e/%2e%2e/secret.webp").status_code == 404
