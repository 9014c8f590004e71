"""Closed by default: hosts, origins, clients, keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest
from conftest import RunningApp
from starlette.datastructures import Headers

from stable_diffusion_server.api.middleware.access_policy import AccessPolicy, allowed_host_names
from stable_diffusion_server.api.middleware.api_keys import ApiKeyring, HashedApiKey, hashed
from stable_diffusion_server.types import Caller

pytestmark = pytest.mark.slow

ORDER = {"prompt": "a red square", "width": 64, "height": 64}


def ask(running_app: RunningApp, **headers: Any) -> httpx.Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return running_app.client.get("/create_and_upload_image", params=ORDER, headers=named)


@pytest.mark.parametrize(
    "host", ["127.0.0.1:8000", "localhost", "LOCALHOST:99", "localhost.", "127.1.2.3", "[::1]:8000"]
)
def test_loopback_names_are_served(running_app: RunningApp, host: str) -> None:
    """Every spelling of this machine."""
    assert ask(running_app, host=host).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        *("evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.nip.io", "10.0.0.5", "[::", ""),
        *("2130706433", "evil.example@localhost:8000:1", "localhost/evil", "localhost:80 evil", "testserver"),
    ],
)
@pytest.mark.parametrize("path", ["/create_and_upload_image", "/healthz", "/files/a.webp", "/docs"])
def test_a_foreign_host_is_misdirected(running_app: RunningApp, host: str, path: str) -> None:
    """421 before anything runs, on every path: a DNS-rebound name must not even reach the files."""
    answer = running_app.client.get(path, params=ORDER, headers={"host": host})
    assert answer.status_code == 421
    assert answer.headers["content-type"] == "application/problem+json"
    assert running_app.squares.prepared == []


def test_names_from_the_settings_are_served(run_app: Callable[..., RunningApp]) -> None:
    """Hosts in ALLOWED_HOSTS and PUBLIC_BASE_URL are accepted, with any port."""
    running_app = run_app(
        allowed_hosts="draw.example, other.example:9000", public_base_url="https://pictures.example:444"
    )
    for host in ("draw.example", "Draw.Example:1", "other.example", "pictures.example"):
        assert ask(running_app, host=host).status_code == 200
    assert ask(running_app, host="evil.example").status_code == 421


def test_a_wildcard_address_is_no_name() -> None:
    """Listening on 0.0.0.0 does not allow every Host header."""
    anywhere = "0.0.0.0"  # noqa: S104  # a name under test, not listened on
    assert allowed_host_names(anywhere, (), "") == frozenset()
    assert allowed_host_names("192.168.1.5", ("A.example",), "") == {"192.168.1.5", "a.example"}


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:8001"},
        {"origin": "https://127.0.0.1:8000"},
        {"sec_fetch_site": "cross-site"},
        {"sec_fetch_site": "cross-site", "sec_fetch_mode": "navigate"},
        {"sec_purpose": "prefetch;prerender"},
    ],
)
def test_a_page_of_another_origin_never_draws(running_app: RunningApp, headers: dict[str, str]) -> None:
    """A web page that the user visits cannot use the device, whether or not it could read the response."""
    assert ask(running_app, **headers).status_code == 403
    assert (
        running_app.client.post("/create_and_upload_image", data=ORDER, headers={"origin": "null"}).status_code == 403
    )
    assert running_app.squares.prepared == []


@pytest.mark.parametrize(
    "headers",
    [{}, {"origin": "http://127.0.0.1:8000"}, {"sec_fetch_site": "same-origin"}, {"sec_fetch_site": "none"}],
)
def test_the_servers_own_pages_and_no_page_at_all_draw(running_app: RunningApp, headers: dict[str, str]) -> None:
    """curl, the address bar and the server's own docs."""
    assert ask(running_app, **headers).status_code == 200


def test_a_browser_that_only_sends_a_referer_is_held_to_it(running_app: RunningApp) -> None:
    """An <img> on another page still sends a Referer in a browser without Sec-Fetch-Site."""
    assert ask(running_app, referer="http://evil.example/page").status_code == 403
    assert ask(running_app, referer="http://127.0.0.1:8000.evil.example/").status_code == 403
    assert ask(running_app, referer="http://127.0.0.1:8000/docs").status_code == 200
    assert ask(running_app, referer="http://evil.example/", sec_fetch_site="same-origin").status_code == 200


def test_an_origin_from_the_settings_draws_and_reads(run_app: Callable[..., RunningApp]) -> None:
    """CORS_ORIGINS allows one origin, preflight included, and no other."""
    running_app = run_app(cors_origins="https://app.example", api_keys="key")
    asked = ask(running_app, origin="https://app.example", sec_fetch_site="cross-site", x_api_key="key")
    assert asked.status_code == 200
    assert asked.headers["access-control-allow-origin"] == "https://app.example"
    preflight = running_app.client.options(
        "/create_and_upload_image",
        headers={
            "origin": "https://app.example",
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization,content-type",
        },
    )
    assert preflight.status_code == 200
    assert ask(running_app, origin="https://evil.example", x_api_key="key").status_code == 403
    refused = ask(running_app, origin="https://app.example", x_api_key="wrong")
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, "https://app.example")


def test_without_cors_no_answer_is_readable_elsewhere(running_app: RunningApp) -> None:
    """No Access-Control header without the setting."""
    answer = ask(running_app, origin="http://127.0.0.1:8000")
    assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize("address", ["192.168.1.9", "8.8.8.8", "fe80::1", "::ffff:8.8.8.8", "testclient"])
def test_a_client_elsewhere_is_refused_without_keys(run_app: Callable[..., RunningApp], address: str) -> None:
    """403 names the setting; requests that generate nothing are still answered."""
    running_app = run_app(client=(address, 5))
    refused = ask(running_app)
    assert refused.status_code == 403
    assert "API_KEYS" in refused.json()["detail"]
    assert "ALLOW_ANONYMOUS" in refused.json()["detail"]
    assert running_app.client.get("/metrics").status_code == 403
    assert running_app.client.get("/healthz").status_code == 200


def test_anonymous_clients_are_let_in_when_the_operator_says_so(run_app: Callable[..., RunningApp]) -> None:
    """ALLOW_ANONYMOUS=1 is an explicit choice, not a default."""
    assert ask(run_app(client=("192.168.1.9", 5), allow_anonymous=True)).status_code == 200


def admitted(policy: AccessPolicy, address: str, path: str = "/jobs", **headers: str) -> Caller:
    scope = {"type": "http", "method": "GET", "path": path, "query_string": b"", "client": (address, 5)}
    return policy.admit(scope, Headers({"host": "localhost", **headers})).caller


def test_callers_are_distinguished_by_key_and_address() -> None:
    """Loopback is the operator, anonymous callers are distinguished by address (IPv6: by /64), keys by name."""
    keys = ApiKeyring([HashedApiKey(Caller("ann", "", admin=True), hashed("a"))])
    assert admitted(AccessPolicy(), "127.0.0.1") == Caller(address="127.0.0.1")
    assert admitted(AccessPolicy(), "127.0.0.1").has_full_access
    anyone = AccessPolicy(allow_anonymous=True)
    for address, reported in (
        ("127.0.0.1", "127.0.0.1"),  # a proxy on this machine looks the same
        ("203.0.113.5", "203.0.113.5"),
        ("::ffff:203.0.113.5", "203.0.113.5"),
        ("2001:db8:1:2:aaaa::1", "2001:db8:1:2::/64"),
    ):
        assert admitted(anyone, address) == Caller(anonymous=True, address=reported)
    assert admitted(anyone, "2001:db8:1:2::9").owner == admitted(anyone, "2001:db8:1:2:ffff::").owner
    for policy in (AccessPolicy(keys=keys), AccessPolicy(keys=keys, allow_anonymous=True)):
        held = admitted(policy, "203.0.113.5", **{"x-api-key": "a"})
        assert held == Caller("ann", "", admin=True, address="203.0.113.5")
    assert admitted(AccessPolicy(keys=keys, allow_anonymous=True), "203.0.113.5").anonymous
    assert admitted(AccessPolicy(keys=keys), "203.0.113.5", "/docs") == Caller(anonymous=True, address="203.0.113.5")


def test_an_owner_that_was_written_down_is_read_back() -> None:
    """Key names contain no blank, so none can be confused with an anonymous client."""
    for caller in (Caller(), Caller("ann"), Caller(anonymous=True, address="203.0.113.5"), Caller(anonymous=True)):
        assert Caller.from_owner(caller.owner, caller.prefix) == caller


@pytest.mark.fault(64)
def test_a_forged_forwarded_header_changes_nothing(run_app: Callable[..., RunningApp]) -> None:
    """The client address comes from the connection."""
    running_app = run_app(client=("192.168.1.9", 5))
    assert (
        ask(running_app, x_forwarded_for="127.0.0.1", x_real_ip="127.0.0.1", forwarded="for=127.0.0.1").status_code
        == 403
    )


@pytest.mark.parametrize("address", ["127.0.0.1", "192.168.1.9"])
def test_with_keys_everyone_needs_one(run_app: Callable[..., RunningApp], address: str) -> None:
    """Any valid key, in either header; no key or a wrong one is 401, also from this machine."""
    running_app = run_app(client=(address, 5), api_keys="first, second")
    right = [{"authorization": "Bearer first"}, {"authorization": "bearer second"}, {"x_api_key": "second"}]
    wrong = [{}, {"x_api_key": "third"}, {"x_api_key": ""}, {"authorization": "Basic first"}, {"x_api_key": "first,"}]
    wrong += [{"authorization": "Bearer "}, {"x_api_key": "f\u00efrst".encode("latin-1")}]
    assert [ask(running_app, **headers).status_code for headers in right] == [200] * 3
    refused = [ask(running_app, **headers) for headers in wrong]
    assert [answer.status_code for answer in refused] == [401] * len(wrong)
    assert refused[0].headers["www-authenticate"] == "Bearer"


def test_a_link_from_another_page_opens_the_docs_and_the_pictures(running_app: RunningApp) -> None:
    """Reading generates nothing, so a link in a mail still works."""
    path = ask(running_app).json()["path"]
    for url in ("/docs", "/openapi.json", path):
        assert running_app.client.get(url, headers={"sec-fetch-site": "cross-site"}).status_code == 200


@pytest.mark.parametrize(
    ("keys", "anonymous", "warned"), [("hunter2", True, True), ("hunter2", False, False), ("", True, False)]
)
def test_keys_beside_anonymous_clients_are_warned_of_at_the_start(
    run_app: Callable[..., RunningApp], capfd: pytest.CaptureFixture[str], keys: str, anonymous: bool, warned: bool
) -> None:
    """Before this version keys closed a server regardless of ALLOW_ANONYMOUS.

    With both set, a warning explains the change.
    """
    run_app(api_keys=keys, allow_anonymous=anonymous)
    assert ("clients without a key may generate images" in "".join(capfd.readouterr())) == warned
