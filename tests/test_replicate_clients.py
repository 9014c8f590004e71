"""Replicate's own Python client, unmodified, against a listening server: run, stream, cancel, webhooks, files."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import httpx
import pytest
import replicate
from fakes import FakeDenoiser, disc, file_of, until
from live_servers import LiveServer
from replicate.exceptions import ModelError, ReplicateError
from replicate.prediction import Prediction
from replicate.webhook import InvalidSignatureError, Webhooks, WebhookSigningSecret

INPUT = {"prompt": "a red square", "width": 64, "height": 64}
KEYS = "ann:key-of-ann,eve:key-of-eve;admin"
MakeClient = Callable[..., replicate.Client]


@pytest.fixture
def client_of() -> Iterator[MakeClient]:
    """Make a client at our address with one of our keys; its connections are closed, which it has no call for."""
    made = []

    def make(server: LiveServer, key: str = "key-of-ann") -> replicate.Client:
        made.append(replicate.Client(api_token=key, base_url=server.url))
        return made[-1]

    yield make
    for client in made:
        client._client.close()


@pytest.fixture
def receiver() -> Iterator[tuple[str, list[tuple[dict[str, str], str]]]]:
    """A receiver of webhooks: its URL, and headers and bodies that it got."""
    got: list[tuple[dict[str, str], str]] = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"])).decode()
            got.append((dict(self.headers), body))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *arguments: Any) -> None:
            """Write nothing."""

    with HTTPServer(("127.0.0.1", 0), Receiver) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}/", got
        server.shutdown()


def test_it_runs_a_model_and_reads_the_image(live_of: Callable[..., LiveServer], client_of: MakeClient) -> None:
    """By a model, by a version, and with a file as a data URL."""
    server = live_of(api_keys=KEYS)
    client = client_of(server)
    for name in ("stability-ai/sdxl", "local/sdxl:sdxl"):
        (url,) = client.run(name, input=INPUT)
        assert httpx.get(url).headers["content-type"] == "image/webp"
    image = io.BytesIO(file_of(disc(64, 64)))
    image.name = "disc.png"
    made = client.predictions.create("sdxl", {**INPUT, "image": image}, wait=30, file_encoding_strategy="base64")
    assert (made.status, made.model) == ("succeeded", "sdxl")
    assert next(one.id for one in client.predictions.list()) == made.id
    assert client.predictions.get(made.id).output == made.output


def test_it_polls_with_progress_and_cancels(live_of: Callable[..., LiveServer], client_of: MakeClient) -> None:
    """`progress` is read from the logs; a cancelled prediction leaves the device."""
    server = live_of(FakeDenoiser(seconds_per_step=0.02), api_keys=KEYS)
    client = client_of(server)
    made = client.models.predictions.create("local/sdxl", {**INPUT, "num_inference_steps": 150})
    assert made.status == "starting"

    def moves() -> bool:
        made.reload()
        return made.progress is not None and made.progress.current > 0

    until(moves)
    assert (made.status, isinstance(made.progress, Prediction.Progress)) == ("processing", True)
    made.cancel()
    made.wait()
    assert made.status == "canceled"
    assert server.squares.finished == []


def test_it_streams_progress_and_output(live_of: Callable[..., LiveServer], client_of: MakeClient) -> None:
    """Events `logs`, `output` and `done`."""
    client = client_of(live_of(FakeDenoiser(seconds_per_step=0.02), api_keys=KEYS))
    events = list(client.stream("local/sdxl", input={**INPUT, "num_inference_steps": 10}))
    kinds = [event.event.value for event in events]
    assert kinds[0] == "logs"
    assert kinds[-2:] == ["output", "done"]
    assert str(events[-2].data).endswith(".webp")


def test_its_webhooks_are_verified(live_of: Callable[..., LiveServer], client_of: MakeClient, receiver: Any) -> None:
    """By the client, with the secret that it asks for: start and end, with ids of their own, as the filter says."""
    url, got = receiver
    host = url.split("/")[2]
    server = live_of(api_keys=KEYS, fetch_allow=[host], **{"webhook_secret": "a secret of ours"})
    client = client_of(server)
    made = client.models.predictions.create("local/sdxl", INPUT, webhook=url)
    until(lambda: len(got) == 2)
    client.models.predictions.create("local/sdxl", INPUT, webhook=url, webhook_events_filter=["start"])
    client.models.predictions.create("local/sdxl", INPUT, webhook=url, webhook_events_filter=["completed"])
    client.models.predictions.create("local/sdxl", INPUT, webhook_completed=url)
    until(lambda: len(got) == 5)
    bodies = [json.loads(body) for _, body in got]
    assert [body["status"] for body in bodies[:2]] == ["starting", "succeeded"]
    assert sorted(body["status"] for body in bodies[2:]) == ["starting", "succeeded", "succeeded"]
    assert {body["id"] for body in bodies[:2]} == {made.id}
    assert bodies[1]["output"] == client.predictions.get(made.id).output
    assert len({headers["webhook-id"] for headers, _ in got}) == 5
    secret = client_of(server, "key-of-eve").webhooks.default.secret()
    for headers, body in got:
        Webhooks.validate(headers=headers, body=body, secret=secret, tolerance=60)
    with pytest.raises(InvalidSignatureError):
        Webhooks.validate(headers=got[0][0], body=got[1][1], secret=secret)
    with pytest.raises(ReplicateError, match="403"):
        client.webhooks.default.secret()
    assert isinstance(secret, WebhookSigningSecret)


def test_it_raises_its_own_errors(live_of: Callable[..., LiveServer], client_of: MakeClient) -> None:
    """A wrong key, an unknown model, a refused value, and a prediction that fails."""
    server = live_of(api_keys=KEYS)
    with pytest.raises(ReplicateError, match="401"):
        client_of(server, "wrong").run("local/sdxl", input=INPUT)
    client = client_of(server)
    with pytest.raises(ReplicateError, match="404"):
        client.run("local/none", input=INPUT)
    with pytest.raises(ReplicateError, match="width must be between"):
        client.run("local/sdxl", input={**INPUT, "width": 1})
    with pytest.raises(ModelError):
        client.run("local/sdxl", input={**INPUT, "prompt": "unsteppable"})
