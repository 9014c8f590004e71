"""Paths, keys and bodies of the OpenAI routes as clients get them wrong: slips in the base URL, hints, OPTIONS."""

from __future__ import annotations

import json
from collections.abc import Callable

import httpx
from conftest import RunningApp

ORDER = {"prompt": "a red square", "size": "64x64"}
BASE = "http://127.0.0.1:8000"


def post(running_app: RunningApp, path: str, **more: object) -> httpx.Response:
    return running_app.client.request("POST", f"{BASE}{path}", **{"json": ORDER, **more})  # type: ignore[arg-type]  # httpx types each argument by itself


SLIPS = [
    "/images/generations",
    "/api/v1/images/generations",
    "//v1/images/generations",
    "/v1//images/generations",
    "/v1/images//generations",
    "//images/generations",
    "/api//v1//images/generations",
    "/v1/images/generations/",
    "/images/generations?api-version=2024-02-01",
    "/v1/images/generations?api-version=2025-04-01-preview&api-version=x",
]


def test_a_slip_in_the_base_url_still_draws(running_app: RunningApp) -> None:
    """No `/v1`, `/api/v1`, further slashes, Azure's version: the same picture as at the right path."""
    for path in SLIPS:
        answer = post(running_app, path)
        assert answer.status_code == 200, (path, answer.text)
        assert answer.json()["data"][0]["key"]


def test_models_are_listed_at_the_same_slips(running_app: RunningApp) -> None:
    """And one of them is found there."""
    for path in ("/models", "/api/v1/models", "/v1//models", "/v1/models/", "//models"):
        assert "sdxl" in {model["id"] for model in running_app.client.get(f"{BASE}{path}").json()["data"]}
        assert running_app.client.get(f"{BASE}{path.rstrip('/')}/sdxl").json()["id"] == "sdxl"


def test_a_model_with_a_slash_in_its_name_is_found(run_app: Callable[..., RunningApp]) -> None:
    """Written plainly, or as clients escape it."""
    running_app = run_app(model_aliases="black-forest-labs/FLUX.1-schnell=flux")
    for name in ("black-forest-labs/FLUX.1-schnell", "black-forest-labs%2FFLUX.1-schnell"):
        answer = running_app.client.get(f"{BASE}/v1/models/{name}")
        assert (answer.status_code, answer.json()["id"]) == (200, "black-forest-labs/FLUX.1-schnell")
    missing = running_app.client.get(f"{BASE}/v1/models/black-forest-labs/none")
    assert (missing.status_code, missing.json()["error"]["param"]) == (404, "model")


MISTAKEN = [
    ("/v2/images/generations", "/v1/images/generations"),
    ("/openai/v1/images/generations", "/v1/images/generations"),
    ("/openai/deployments/x/images/generations?api-version=1", "/v1/images/generations"),
    ("/v1/v1/images/edits", "/v1/images/edits"),
    ("/api/images/variations/", "/v1/images/variations"),
    ("/proxy//models", "/v1/models"),
    ("/v1/chat/completions", "/v1/images/generations"),
    ("/chat/completions", "/v1/images/generations"),
    ("/v1/embeddings", "/v1/images/generations"),
    ("/v1/image/generations", "/v1/images/generations"),
]


def test_another_path_that_ends_like_openais_names_the_right_one(running_app: RunningApp) -> None:
    """404 in the format that OpenAI's clients show, and nothing is drawn."""
    for path, right in MISTAKEN:
        answer = post(running_app, path)
        error = answer.json()["error"]
        assert (answer.status_code, error["type"]) == (404, "invalid_request_error")
        assert right in error["message"], path
    assert running_app.squares.prepared == []


def test_a_path_unlike_openais_keeps_our_format(running_app: RunningApp) -> None:
    """problem+json, as before."""
    for path in ("/nothing", "/v1/replay/none", "/jobs/none", "/models-of-mine", "/image"):
        answer = running_app.client.get(f"{BASE}{path}")
        assert (answer.status_code, answer.headers["content-type"]) == (404, "application/problem+json")


def test_a_long_path_costs_nothing(running_app: RunningApp) -> None:
    """Thousands of slashes and words: 404 at once, without a copy of them in the answer."""
    for path in ("/" * 9000 + "images/generations", "/v1" * 3000 + "/images/generations", "/models" + "/a" * 4000):
        answer = running_app.client.get(f"{BASE}{path}")
        assert answer.status_code == 404
        assert len(answer.content) < 1000


OPTIONAL = "/v1/images/generations /images/edits /v1/models /make_image /jobs /history".split()


def test_options_is_answered_without_an_origin(run_app: Callable[..., RunningApp]) -> None:
    """A client asks by it whether the server is there: 2xx with the methods, without a key and without a preflight."""
    running_app = run_app(api_keys="key", cors_origins="https://app.example")
    for path in OPTIONAL:
        answer = running_app.client.options(path)
        assert answer.is_success
        assert "OPTIONS" in answer.headers["allow"]
        assert running_app.client.options(path, headers={"origin": "https://evil.example"}).status_code == 403
    assert running_app.client.options("/healthz").is_success
    assert running_app.client.options("/v1/nothing").status_code == 404


def test_liveness_has_the_names_of_other_servers(run_app: Callable[..., RunningApp]) -> None:
    """Without a key, from anywhere."""
    running_app = run_app(api_keys="key", client=("8.8.8.8", 5))
    for path in ("/healthz", "/health", "/ping"):
        assert running_app.client.get(path).json() == {"status": "ok"}


KEYED = [
    {"authorization": "Bearer right"},
    {"authorization": "bearer   right"},
    {"authorization": "Token right"},
    {"authorization": "right"},
    {"authorization": "Basic dXNlcjpyaWdodA=="},
    {"x-api-key": "right"},
    {"api-key": "right"},
    {"api-key": "right", "authorization": ""},
    {"api-key": "right", "authorization": "Bearer"},
    {"api-key": "right", "authorization": "Bearer "},
]
UNKEYED: list[dict[str, str]] = [
    {},
    {"api-key": "wrong"},
    {"authorization": "wrong"},
    {"authorization": "Hawk right"},
    {"authorization": "right right"},
    {"authorization": "Bearer wrong", "api-key": "right"},
    {"authorization": "wrong", "api-key": "right"},
    {"api-key": ""},
    {"authorization": "Basic"},
    {"authorization": "Basic cmlnaHQ="},
    {"authorization": "Digest"},
    {"api-key": "right, right"},
]


def test_a_key_is_taken_as_clients_send_it(run_app: Callable[..., RunningApp]) -> None:
    """Azure's header, and a key without a scheme, beside the ways that were there; other schemes are no keys.

    A secret in Authorization is the one that counts.
    """
    running_app = run_app(api_keys="right")
    for headers in UNKEYED:
        assert running_app.client.get("/v1/models", headers=headers).status_code == 401, headers
    for headers in KEYED:
        assert running_app.client.get("/v1/models", headers=headers).status_code == 200, headers


def test_wrong_keys_in_azures_header_slow_down(run_app: Callable[..., RunningApp]) -> None:
    """They count as guesses like any other."""
    running_app = run_app(api_keys="right", client=("8.8.8.8", 5))
    answers = [
        running_app.client.get("/v1/models", headers={"api-key": f"wrong-{number}"}).status_code for number in range(30)
    ]
    assert (answers[0], answers[-1]) == (401, 429)


UNTYPED = [None, "application/x-www-form-urlencoded", "text/plain;charset=UTF-8", "text/plain", ""]


def untyped(running_app: RunningApp, path: str, media_type: str | None, body: bytes) -> httpx.Response:
    headers = {} if media_type is None else {"content-type": media_type}
    return post(running_app, path, json=None, content=body, headers=headers)


def test_json_without_its_media_type_is_taken(running_app: RunningApp) -> None:
    """`curl --data`, `requests` with a text, `fetch` with a text."""
    for path in ("/v1/images/generations", "/create_and_upload_image", "/make_image"):
        order = {"prompt": "a red square", **({"size": "64x64"} if "v1" in path else {"width": 64, "height": 64})}
        for media_type in UNTYPED:
            for prefix in (b"", b"\xef\xbb\xbf", b" \r\n"):
                answer = untyped(running_app, path, media_type, prefix + json.dumps(order).encode())
                assert answer.status_code == 200, answer.text


BROKEN: dict[bytes, int] = {
    b'{"prompt": "a': 400,
    b'{"a":' * 10_000: 400,
    b'{"prompt": "a", "prompt": "b"}': 400,
    b'{"prompt": "a", "overwrite": 7}': 422,
    b"a red square": 415,
}


def test_json_without_its_media_type_keeps_the_rules_of_json(running_app: RunningApp) -> None:
    """Broken, deep, doubled: 400. What is no JSON stays a form, or unknown."""
    for media_type in UNTYPED:
        for body, status in BROKEN.items():
            answer = untyped(running_app, "/create_and_upload_image", media_type, body)
            expected = 422 if status == 415 and media_type and "form" in media_type else status
            assert answer.status_code == expected, (media_type, body[:40], answer.text[:200])
    assert running_app.squares.prepared == []


def test_a_foreign_page_cannot_use_json_without_a_media_type(running_app: RunningApp) -> None:
    """Such a request needs no preflight request, so the origin alone has to stop it."""
    body = json.dumps(ORDER).encode()
    for headers in ({"origin": "https://evil.example"}, {"sec-fetch-site": "cross-site"}, {"referer": "http://e.vil/"}):
        sent = {"content-type": "text/plain", **headers}
        assert post(running_app, "/v1/images/generations", json=None, content=body, headers=sent).status_code == 403
    assert running_app.squares.prepared == []
