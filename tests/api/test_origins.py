"""Requests from other origins, by the headers browsers send; wrong keys by address; untrusted proxies."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from conftest import RunningApp
from starlette.datastructures import Headers

from stable_diffusion_server.api.middleware.access_policy import OriginPolicy
from stable_diffusion_server.api.middleware.rate_limiter import FailedLoginLimiter
from stable_diffusion_server.errors import Forbidden

pytestmark = pytest.mark.slow

ORDER = {"prompt": "a red square", "width": 64, "height": 64}
IMG = {"sec-fetch-dest": "image", "sec-fetch-mode": "no-cors"}
LINK = {"sec-fetch-dest": "document", "sec-fetch-mode": "navigate"}
FOREIGN = [
    {"sec-fetch-site": "same-site", **IMG},
    {"sec-fetch-site": "same-site", **LINK},
    {"sec-fetch-site": "same-site", "referer": "http://localhost:3000/"},
    {"sec-fetch-site": "same-site", "origin": "http://127.0.0.1:3000"},
    {"sec-fetch-site": "CROSS-SITE", **IMG},
    {"sec-fetch-site": "same-origin, cross-site"},
    {"sec-fetch-site": ""},
    {"sec-fetch-site": "future-site"},
    {"referer": "http://localhost:3000/page"},
]


@pytest.mark.fault(147)
@pytest.mark.parametrize("headers", FOREIGN, ids=str)
def test_a_page_of_another_port_or_subdomain_has_no_effect(running_app: RunningApp, headers: dict[str, str]) -> None:
    """For every method: generating, deleting, stopping and listing are refused before anything happens."""
    key = running_app.draw(prompt="a red square").json()["key"]
    drawn = len(running_app.squares.prepared)
    for method, path in (
        ("GET", "/create_and_upload_image?overwrite=true&save_path=x.webp&prompt=x"),
        ("GET", "/make_image?prompt=x"),
        ("POST", "/create_and_upload_image"),
        ("POST", "/v1/images/generations"),
        ("POST", "/sdapi/v1/interrupt"),
        ("DELETE", f"/files/{key}"),
        ("DELETE", "/jobs/none"),
        ("GET", "/history"),
        ("POST", "/ui/key"),
    ):
        answer = running_app.client.request(method, path, headers=headers, json=ORDER if method == "POST" else None)
        assert answer.status_code == 403, (method, path)
    assert len(running_app.squares.prepared) == drawn
    assert running_app.client.get(f"/files/{key}", headers=headers).status_code == 200, "pictures are shown elsewhere"


@pytest.mark.fault(147)
@pytest.mark.parametrize(
    "headers",
    [
        {"sec-fetch-site": "cross-site", **IMG},
        {"sec-fetch-site": "same-site", "sec-fetch-dest": "script", "sec-fetch-mode": "no-cors"},
        {"sec-fetch-site": "cross-site", "sec-fetch-dest": "iframe", "sec-fetch-mode": "navigate"},
        {"sec-fetch-site": "same-site", "sec-fetch-dest": "empty", "sec-fetch-mode": "cors"},
        {"sec-fetch-site": "cross-site", "sec-fetch-dest": "document", "sec-fetch-mode": "no-cors"},
        {"referer": "http://evil.example/", "accept": "image/avif,image/webp,*/*"},
        {"origin": "http://evil.example"},
        {"sec-fetch-site": "cross-site", "sec-purpose": "prefetch", **LINK},
    ],
    ids=str,
)
def test_the_ui_is_opened_by_a_link_and_not_as_a_part_of_another_page(headers: dict[str, str]) -> None:
    """Loaded as an image, script or frame it would start Gradio for an invisible page."""
    scope, origins = {"scheme": "http"}, OriginPolicy()
    host = {"host": "127.0.0.1:8000"}
    with pytest.raises(Forbidden):
        origins.check_page(scope, Headers({**host, **headers}))
    for site in ("cross-site", "same-site", "same-origin", "none"):
        origins.check_page(scope, Headers({**host, "sec-fetch-site": site, **LINK}))
    origins.check_page(scope, Headers({**host, "referer": "http://evil.example/", "accept": "text/html,*/*"}))
    origins.check_page(scope, Headers(host))


@pytest.mark.fault(147)
def test_no_heavy_page_is_loaded_for_a_picture_elsewhere(running_app: RunningApp) -> None:
    """The UI, the docs, the OpenAPI document and the status: 403 as an image, allowed as a link."""
    for path in ("/ui", "/ui/", "/docs", "/openapi.json", "/readyz", "/"):
        for site in ("cross-site", "same-site"):
            assert running_app.client.get(path, headers={"sec-fetch-site": site, **IMG}).status_code == 403, path
    link = {"sec-fetch-site": "cross-site", **LINK}
    assert [running_app.client.get(path, headers=link).status_code for path in ("/docs", "/readyz")] == [200, 200]


@pytest.mark.fault(147)
def test_same_site_is_let_in_where_the_operator_says_so(run_app: Callable[..., RunningApp]) -> None:
    """ALLOW_SAME_SITE=1 allows other ports and subdomains, and nothing more."""
    running_app = run_app(allow_same_site=True)

    def asked(**headers: str) -> int:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return running_app.client.get("/create_and_upload_image", params=ORDER, headers=named).status_code

    assert asked(sec_fetch_site="same-site") == 200
    assert asked(sec_fetch_site="same-site", origin="http://localhost:3000") == 200
    assert asked(sec_fetch_site="cross-site") == 403
    assert asked(origin="http://localhost:3000") == 403
    assert asked(sec_fetch_site="same-site", sec_purpose="prefetch") == 403


SIGNS = (
    "via x-forwarded-for x-forwarded-port x-forwarded-server x-forwarded x-real-ip x-client-ip true-client-ip "
    "forwarded "
    "cf-connecting-ip cf-ray fastly-client-ip fly-client-ip x-azure-clientip x-azure-fdid akamai-origin-hop client-ip "
    "x-cluster-client-ip x-amzn-trace-id x-appengine-user-ip x-envoy-external-address x-vercel-id x-original-host "
    "x-arr-log-id x-cloud-trace-context cdn-loop x-forwarded-prefix x-nginx-proxy tailscale-user-login x-real-port"
).split()


@pytest.mark.fault(148)
@pytest.mark.parametrize("name", SIGNS)
def test_a_proxy_that_is_not_named_gives_itself_away(running_app: RunningApp, name: str) -> None:
    """Any forwarding header, even an empty one, marks the request as remote on a server without keys."""
    for value in ("127.0.0.1", ""):
        answer = running_app.client.get("/create_and_upload_image", params=ORDER, headers={name: value})
        assert answer.status_code == 403, name
    assert running_app.squares.prepared == []
    plain = {"accept-language": "de", "traceparent": "00-1", "x-request-id": "r", "dnt": "1", "user-agent": "Via/1"}
    assert running_app.client.get("/history", headers=plain).status_code == 200


@pytest.mark.fault(149)
def test_wrong_keys_from_one_address_slow_down(run_app: Callable[..., RunningApp]) -> None:
    """A few 401, then 429 with Retry-After; the right key still works, and so do other addresses."""
    running_app = run_app(api_keys="right, other:second", trusted_proxies="127.0.0.1")

    def asked(key: str, address: str = "203.0.113.5", **headers: str) -> int:
        sent = {"x-forwarded-for": address, "x-api-key": key, **headers}
        return running_app.client.get("/v1/models", headers=sent).status_code

    reported = [asked(f"wrong-{number}") for number in range(100)]
    assert set(reported[:20]) == {401}
    assert set(reported[20:]) == {429}
    refused = running_app.client.get("/v1/models", headers={"x-forwarded-for": "203.0.113.5", "x-api-key": "w"})
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert asked("right") == 200
    assert asked("wrong", "203.0.113.6") == 401
    # An IPv6 client has a whole /64 to send from; keys are also accepted as HTTP Basic.
    for number in range(25):
        last = asked("", f"2001:db8:1:2::{number:x}", authorization="Basic eHg6eHg=")
    assert last == 429
    # A request without a key is not a guess.
    running_app = run_app(api_keys="right")
    assert {running_app.client.get("/v1/models").status_code for _ in range(60)} == {401}


def test_addresses_of_wrong_keys_are_forgotten_and_bounded() -> None:
    """By age and number; after very many wrong keys only keys that succeeded before are checked."""
    now = [0.0]
    wrong = FailedLoginLimiter(a_minute=3, an_hour=10, now=lambda: now[0])
    assert [wrong.wrong("a") for _ in range(5)] == [0, 0, 0, 60, 60]
    assert wrong.right("a", "seen") == 0
    for _ in range(8):
        wrong.wrong("a")
    assert (wrong.right("a", "seen"), wrong.right("b", "new")) == (0, 0)
    assert wrong.right("a", "new") == 3600
    now[0] = 61.0
    assert wrong.wrong("a") == 0
    now[0] = 3601.0
    assert wrong.right("a", "new") == 0
    for number in range(12_000):
        wrong.wrong(f"address {number}")
    assert len(wrong) == 10_000
