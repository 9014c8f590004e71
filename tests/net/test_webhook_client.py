"""Webhook messages: content, signature, and forbidden targets."""

from __future__ import annotations

import base64
import hashlib
import hmac
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from stable_diffusion_server.errors import InvalidInput, RemoteFetchFailed
from stable_diffusion_server.jobs.webhooks import sign_webhook
from stable_diffusion_server.net.url_policy import AllowedTarget
from stable_diffusion_server.net.webhook_client import WebhookClient


@dataclass
class Receiver:
    """A loopback web server that records requests, and answers as configured."""

    port: int = 0
    status: int = 204
    silence: float = 0.0
    heard: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    """Listen on loopback."""
    reported = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            reported.heard.append((self.path, {name.lower(): value for name, value in self.headers.items()}, body))
            time.sleep(reported.silence)
            self.send_response(reported.status)
            self.send_header("Location", f"http://127.0.0.1:{reported.port}/elsewhere")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    reported.port = server.server_port
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield reported
    server.shutdown()
    server.server_close()
    thread.join()


def poster_to(receiver: Receiver, seconds: float = 10.0) -> WebhookClient:
    return WebhookClient(seconds, [AllowedTarget.parse(f"127.0.0.1:{receiver.port}")])


async def test_a_message_arrives_signed(receiver: Receiver) -> None:
    """The body unchanged, and a signature that the receiver can verify with the secret alone."""
    poster, body = poster_to(receiver), b'{"id": "job"}'
    url = f"http://127.0.0.1:{receiver.port}/hook?x=1"
    await poster.check(url)
    assert await poster.post(url, body, sign_webhook("job", 1_700_000_000, body, "secret")) == 204
    ((path, headers, got),) = receiver.heard
    assert (path, got, headers["content-type"]) == ("/hook?x=1", body, "application/json")
    content = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + got
    expected = base64.b64encode(hmac.new(b"secret", content, hashlib.sha256).digest()).decode()
    assert headers["webhook-signature"] == f"v1,{expected}"
    poster.close()


def test_the_signature_is_that_of_the_standard() -> None:
    """The example of the specification's reference libraries; without a secret there is no signature."""
    secret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"  # noqa: S105  # the specification's example
    headers = sign_webhook("msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}', secret)
    assert headers["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
    assert "webhook-signature" not in sign_webhook("id", 1, b"", "")


async def test_a_redirect_is_an_answer_and_not_followed(receiver: Receiver) -> None:
    """A redirect could lead to an unchecked address."""
    poster = poster_to(receiver)
    receiver.status = 307
    assert await poster.post(f"http://127.0.0.1:{receiver.port}/", b"{}", {}) == 307
    assert len(receiver.heard) == 1
    poster.close()


async def test_a_receiver_that_keeps_silent_or_is_not_there_is_reported(receiver: Receiver) -> None:
    """Within the timeout."""
    poster = poster_to(receiver, seconds=0.3)
    receiver.silence = 2
    with pytest.raises(RemoteFetchFailed, match="did not answer"):
        await poster.post(f"http://127.0.0.1:{receiver.port}/", b"{}", {})
    poster.close()
    nobody = WebhookClient(5, [AllowedTarget.parse("127.0.0.1:1")])
    with pytest.raises(RemoteFetchFailed, match="no connection"):
        await nobody.post("http://127.0.0.1:1/", b"{}", {})
    nobody.close()


@pytest.mark.parametrize("url", ["http://127.0.0.1/", "http://[::1]/", "http://10.0.0.1/", "file:///etc/passwd", "x"])
async def test_no_message_goes_to_an_address_inside(url: str) -> None:
    """The same rules as for image URLs, both on submission and at delivery."""
    poster = WebhookClient(5)
    with pytest.raises(InvalidInput):
        await poster.check(url)
    with pytest.raises(InvalidInput):
        await poster.post(url, b"{}", {})
    poster.close()
