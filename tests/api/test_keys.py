"""API keys and their limits: permissions, rates, concurrency; the table of routes and required keys."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import RunningApp
from fakes import FakeDenoiser, until

from stable_diffusion_server.settings.auth import parse_keys

pytestmark = pytest.mark.slow

ORDER = {"prompt": "a red square", "width": 64, "height": 64}
KEYS = "ann:secret-a;rate=3/minute, bob:secret-b;concurrency=1, cid:secret-c;prefix=team-c/, secret-d"


def ask(
    running_app: RunningApp, key: str | None = None, path: str = "/create_and_upload_image", **more: Any
) -> httpx.Response:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    return running_app.client.get(path, params={**ORDER, **more}, headers=headers)


def test_a_key_is_written_with_what_it_may() -> None:
    """Name, secret, rate, concurrency, prefix; a secret without a name gets one that does not depend on other keys."""
    ann, plain = parse_keys(["ann:s3cret;rate=60/minute;concurrency=4;prefix=team-a", "plain"])
    assert (ann.name, ann.secret.get_secret_value(), ann.rate, ann.concurrency) == ("ann", "s3cret", "60/minute", 4)
    assert ann.prefix == "team-a/"
    assert plain.name.startswith("key-")
    assert plain.name == parse_keys(["plain"])[0].name
    assert "s3cret" not in repr(ann)


def test_a_sole_key_is_admin_and_of_several_only_those_that_are_marked() -> None:
    """A sole key has the server to itself; with two or more, the operator must mark the admin."""
    assert [key.admin for key in parse_keys(["only"])] == [True]
    written = ["ann:a", "bob:b;admin", "cid:c;rate=1/minute;admin;prefix=x"]
    assert [key.admin for key in parse_keys(written)] == [False, True, True]


@pytest.mark.parametrize(
    "written",
    [
        *(["a:s;rate=often"], ["a:s;rate=0/minute"], ["a:s;concurrency=0"], ["a:s;prefix=../x"], ["a:s;prefix="]),
        *(["a:s;admin;admin"], ["a:s;admin=1"], ["a:s;Admin"]),
        *(["a:s;colour=red"], ["a:s;rate=1/second;rate=2/second"], ["a:s", "a:t"], ["a:s", "b:s"], ["a:tw o"]),
    ],
)
def test_a_key_that_is_written_wrong_is_refused(written: list[str]) -> None:
    """A malformed key stops the start, since it could leave the server open."""
    with pytest.raises(ValueError, match=r"^(has|holds) "):
        parse_keys(written)


def test_keys_may_lie_in_a_file(run_app: Callable[..., RunningApp], tmp_path: Path) -> None:
    """One per line, with comments, in addition to those of the setting."""
    file = tmp_path / "keys"
    file.write_text("# the team's\nann:from-file  # Ann\n\n")
    running_app = run_app(api_keys="plain", api_keys_file=file)
    assert [ask(running_app, key).status_code for key in ("plain", "from-file", "#", "ann")] == [200, 200, 401, 401]


# Expected status per caller (no key, wrong key, valid key) and kind of route.
ROUTES = {
    ("GET", "/create_and_upload_image"): (401, 401, 200),
    ("GET", "/make_image"): (401, 401, 200),
    ("POST", "/inpaint_and_upload_image"): (401, 401, 422),
    ("POST", "/style_transfer_and_upload_image"): (401, 401, 422),
    ("GET", "/edit_and_upload_image"): (401, 401, 422),
    ("POST", "/edit_and_upload_image"): (401, 401, 422),
    ("POST", "/style_transfer_bytes_and_upload_image"): (401, 401, 422),
    ("POST", "/v1/images/generations"): (401, 401, 400),
    ("POST", "/v1/images/edits"): (401, 401, 400),
    ("GET", "/v1/models"): (401, 401, 200),
    ("POST", "/sdapi/v1/txt2img"): (401, 401, 200),
    ("POST", "/sdapi/v1/img2img"): (401, 401, 422),
    ("GET", "/sdapi/v1/progress"): (401, 401, 200),
    ("POST", "/sdapi/v1/interrupt"): (401, 401, 200),
    ("GET", "/sdapi/v1/sd-models"): (401, 401, 200),
    ("GET", "/sdapi/v1/samplers"): (401, 401, 200),
    ("GET", "/sdapi/v1/options"): (401, 401, 200),
    ("GET", "/sdapi/v1/loras"): (401, 401, 200),
    ("POST", "/sdapi/v1/png-info"): (401, 401, 422),
    ("POST", "/internal/progress"): (401, 401, 200),
    ("GET", "/internal/ping"): (401, 401, 200),
    ("POST", "/sdapi/v1/options"): (401, 401, 200),
    ("POST", "/sdapi/v1/skip"): (401, 401, 200),
    ("GET", "/sdapi/v1/cmd-flags"): (401, 401, 200),
    ("GET", "/sdapi/v1/upscalers"): (401, 401, 200),
    ("GET", "/sdapi/v1/memory"): (401, 401, 200),
    ("POST", "/sdapi/v1/refresh-checkpoints"): (401, 401, 200),
    ("POST", "/sdapi/v1/server-kill"): (401, 401, 403),
    ("POST", "/sdapi/v1/extra-single-image"): (401, 401, 422),
    ("POST", "/sdapi/v1/extra-batch-images"): (401, 401, 422),
    ("GET", "/controlnet/model_list"): (401, 401, 200),
    ("POST", "/controlnet/detect"): (401, 401, 422),
    ("GET", "/config"): (401, 401, 200),
    ("GET", "/user"): (401, 401, 200),
    ("GET", "/app_id"): (401, 401, 200),
    ("GET", "/history"): (401, 401, 200),
    ("GET", "/metrics"): (401, 401, 200),
    ("GET", "/jobs/none"): (401, 401, 404),
    ("DELETE", "/jobs/none"): (401, 401, None),
    ("GET", "/nothing"): (401, 401, 404),
    ("GET", "/healthz"): (200, 200, 200),
    ("GET", "/readyz"): (200, 200, 200),
    ("GET", "/docs"): (200, 200, 200),
    ("GET", "/openapi.json"): (200, 200, 200),
    ("GET", "/files/none"): (404, 404, 404),
}


@pytest.mark.parametrize(("route", "expected"), ROUTES.items(), ids=lambda value: str(value))
def test_the_table_of_endpoints_and_keys(
    run_app: Callable[..., RunningApp], route: tuple[str, str], expected: tuple[int | None, ...]
) -> None:
    """Only routes that neither generate nor reveal are open: health, docs, and images, which are meant to be shown."""
    running_app = run_app(api_keys="right")
    method, path = route
    for key, status in zip((None, "wrong", "right"), expected, strict=True):
        headers = {"authorization": f"Bearer {key}"} if key else {}
        answer = running_app.client.request(
            method, path, params=ORDER if path.endswith("image") else None, headers=headers
        )
        assert status is None or answer.status_code == status, (route, key, answer.text)


def test_a_key_over_its_rate_gets_retry_after(run_app: Callable[..., RunningApp]) -> None:
    """Three a minute: the fourth is 429 with Retry-After; other keys are unaffected, and polling does not count."""
    running_app = run_app(api_keys=KEYS)
    answers = [ask(running_app, "secret-a") for _ in range(4)]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
    assert [answer.headers["ratelimit-remaining"] for answer in answers] == ["2", "1", "0", "0"]
    refused = answers[3]
    assert refused.headers["ratelimit-policy"] == "3;w=60"
    assert 50 <= int(refused.headers["retry-after"]) <= 60
    assert refused.json()["type"].endswith("rate-limited")
    assert ask(running_app, "secret-b").status_code == 200
    assert ask(running_app, "secret-a", "/metrics").status_code == 200
    assert "ratelimit-limit" not in ask(running_app, "secret-b").headers


def test_a_key_may_be_the_password_of_http_basic(run_app: Callable[..., RunningApp]) -> None:
    """AUTOMATIC1111 clients send it so, with any user name."""
    running_app = run_app(api_keys="ann:right")
    for name, password, status in (("ann", "right", 200), ("", "right", 200), ("right", "", 401), ("ann", "x", 401)):
        answer = running_app.client.get("/sdapi/v1/samplers", auth=(name, password))
        assert answer.status_code == status


def test_a_rate_for_everyone_counts_keys_and_addresses_apart(run_app: Callable[..., RunningApp]) -> None:
    """RATE_LIMIT applies to keys without their own rate, and to each address where no key is needed."""
    running_app = run_app(api_keys="one, two:second;rate=9/minute", rate_limit="1/minute")
    assert [ask(running_app, key).status_code for key in ("one", "one", "second", "second")] == [200, 429, 200, 200]
    running_app = run_app(rate_limit="1/minute")
    assert [ask(running_app).status_code for _ in range(2)] == [200, 429]


def test_a_key_over_its_concurrency_is_refused_until_one_ends(run_app: Callable[..., RunningApp]) -> None:
    """Limit one: the second is 429 at once, another key succeeds, and afterwards so does this one."""
    squares = FakeDenoiser(gate=threading.Event())
    assert squares.gate is not None
    running_app = run_app(squares, api_keys=KEYS)
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(ask, running_app, "secret-b", seed=1)
        until(lambda: bool(squares.batches))
        refused = ask(running_app, "secret-b", seed=2)
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        other = pool.submit(ask, running_app, "secret-d", seed=3)
        squares.gate.set()
        assert (running.result().status_code, other.result().status_code) == (200, 200)
    assert ask(running_app, "secret-b", seed=2).status_code == 200


def test_a_key_with_a_prefix_writes_nowhere_else(run_app: Callable[..., RunningApp]) -> None:
    """Names outside of the prefix are 403, also to overwrite; a request without a name gets one inside."""
    running_app = run_app(api_keys=KEYS)
    assert ask(running_app, "secret-d", save_path="free.webp").status_code == 200
    for name in ("free.webp", "team-d/a.webp", "team-c", "team-cc/a.webp"):
        refused = ask(running_app, "secret-c", save_path=name, overwrite=True)
        assert (refused.status_code, refused.json()["field"]) == (403, "save_path")
    assert ask(running_app, "secret-c", save_path="team-c/../free.webp").status_code == 422
    assert ask(running_app, "secret-c", save_path="team-c/a.webp").json()["key"] == "static/uploads/team-c/a.webp"
    assert ask(running_app, "secret-c").json()["key"].startswith("static/uploads/team-c/")
    assert not ask(running_app, "secret-d").json()["key"].startswith("static/uploads/team-c/")


@pytest.mark.parametrize("header", ["x-forwarded-for", "x-real-ip", "forwarded", "x-forwarded-host"])
def test_a_proxy_that_is_not_named_opens_nothing(run_app: Callable[..., RunningApp], header: str) -> None:
    """An untrusted proxy on this machine must not make every remote client look local."""
    running_app = run_app()
    answer = running_app.client.get("/create_and_upload_image", params=ORDER, headers={header: "127.0.0.1"})
    assert answer.status_code == 403


def test_a_proxy_that_is_named_is_believed(run_app: Callable[..., RunningApp]) -> None:
    """The client is the last address that is not a trusted proxy; host and scheme come from the proxy."""
    running_app = run_app(trusted_proxies="127.0.0.1, 10.0.0.0/8", allowed_hosts="draw.example", rate_limit="1/minute")

    def through(*hops: str, host: str = "draw.example", key: str = "") -> httpx.Response:
        headers = {"x-forwarded-for": ", ".join(hops), "x-forwarded-host": host, "x-forwarded-proto": "https"}
        return running_app.client.get("/create_and_upload_image", params=ORDER, headers={**headers, "x-api-key": key})

    assert through("127.0.0.1", "8.8.8.8").status_code == 403  # the client invented the first address
    assert through("127.0.0.1", "8.8.8.8", "10.1.2.3").status_code == 403
    assert through("127.0.0.1", host="evil.example").status_code == 421
    running_app = run_app(
        trusted_proxies="127.0.0.1", allowed_hosts="draw.example", api_keys="k", rate_limit="9/minute"
    )
    answer = through("8.8.8.8", key="k")
    assert answer.json()["path"].startswith("https://draw.example/files/")


def test_rates_count_the_client_behind_the_proxy(run_app: Callable[..., RunningApp]) -> None:
    """Otherwise one visitor would use up the rate of all."""
    running_app = run_app(trusted_proxies="127.0.0.1", allow_anonymous=True, rate_limit="1/minute")

    def by(client: str) -> int:
        headers = {"x-forwarded-for": client}
        return running_app.client.get("/create_and_upload_image", params=ORDER, headers=headers).status_code

    assert [by("8.8.8.8"), by("8.8.8.8"), by("9.9.9.9")] == [200, 429, 200]


@pytest.mark.parametrize("headers", [{"purpose": "prefetch"}, {"sec-purpose": "prefetch"}, {"x-moz": "prefetch"}])
def test_a_prefetch_draws_nothing(running_app: RunningApp, headers: dict[str, str]) -> None:
    """A browser that prefetches links does not use the device."""
    answer = running_app.client.get("/create_and_upload_image", params=ORDER, headers=headers)
    assert answer.status_code == 403
    assert running_app.squares.prepared == []


def test_head_draws_nothing_and_get_only_while_it_may(run_app: Callable[..., RunningApp]) -> None:
    """HEAD is 405 on every generating route; with GET_GENERATES=0 so is GET, and Allow lists the methods."""
    running_app = run_app(get_generates=False)
    for method in ("HEAD", "GET"):
        answer = running_app.client.request(method, "/create_and_upload_image", params=ORDER)
        assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    assert running_app.squares.prepared == []
    assert running_app.client.post("/create_and_upload_image", json=ORDER).status_code == 200
    assert run_app().client.head("/create_and_upload_image", params=ORDER).status_code == 405


def test_an_unexpected_error_is_as_well_protected(running_app: RunningApp) -> None:
    """The response bypasses the middleware, but has the security headers and the route's error format."""
    for path, size in (("/create_and_upload_image", {"width": 64}), ("/v1/images/generations", {"size": "64x64"})):
        answer = running_app.client.post(path, json={"prompt": "an unpreparable square", **size})
        assert answer.status_code == 500
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cache-control"] == "no-store"
        assert ("error" in answer.json()) == path.startswith("/v1")


@pytest.mark.parametrize("path", ["/create_and_upload_image", "/healthz", "/nothing", "/files/none", "/metrics"])
def test_every_answer_tells_browsers_what_it_is_not(running_app: RunningApp, path: str) -> None:
    """No type sniffing, no framing, no loading, no caching of private responses."""
    headers = running_app.client.get(path, params=ORDER).headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cross-origin-resource-policy"] == ("cross-origin" if path.startswith("/files/") else "same-origin")
    assert headers["x-frame-options"] == "DENY"
    assert headers["content-security-policy"].startswith("default-src 'none'")
    assert headers["cache-control"] == "no-store"
