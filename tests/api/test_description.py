"""The OpenAPI document, the page that shows it, and docs/api.md."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from conftest import ROOT, RunningApp

from stable_diffusion_server.cli import describe_api

pytestmark = pytest.mark.slow


def operations(running_app: RunningApp) -> Iterator[tuple[str, str, dict[str, Any]]]:
    document = running_app.client.get("/openapi.json").json()
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield method, path, operation


def test_the_page_loads_nothing_from_elsewhere(running_app: RunningApp) -> None:
    """Every URL on the page belongs to this server and answers; the page's CSP forbids other origins."""
    page = running_app.client.get("/docs")
    assert page.status_code == 200
    addresses = re.findall(r"(?:src|href)=\"([^\"]+)\"", page.text)
    assert len(addresses) == 4
    for address in addresses:
        assert address.startswith("/docs/")
        asset = running_app.client.get(address)
        assert (asset.status_code, asset.headers["x-content-type-options"]) == (200, "nosniff")
        assert len(asset.content) > 100
    assert "https://" not in page.text + running_app.client.get("/docs/start.js").text
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "http" not in policy
    assert running_app.client.get("/docs/secrets.js").status_code == 404


def test_every_operation_is_described_completely(running_app: RunningApp) -> None:
    """Each has a unique operationId usable as a function name, a description, and every response with its schema."""
    ids = []
    for method, path, operation in operations(running_app):
        ids.append(operation["operationId"])
        assert re.fullmatch(r"[a-z][a-z0-9_]*", operation["operationId"]), path
        assert operation["summary"]
        assert operation["tags"]
        for status, reported in operation["responses"].items():
            if status >= "4" and method != "head":
                (content,) = reported["content"].values()
                assert content["schema"]["$ref"].startswith("#/components/schemas/"), (path, status)
        assert {"default", "401", "403", "421", "500"} <= set(operation["responses"])
    assert len(set(ids)) == len(ids)


def test_references_lead_somewhere(running_app: RunningApp) -> None:
    """Every `$ref` points to an existing schema."""
    text = running_app.client.get("/openapi.json").text
    known = set(running_app.client.get("/openapi.json").json()["components"]["schemas"])
    assert set(re.findall(r'"#/components/schemas/([^"]+)"', text)) <= known


def test_words_of_a_kind_are_enumerated_and_numbers_bounded(running_app: RunningApp) -> None:
    """Models, schedulers and formats are enumerated; sides and steps have the bounds of the settings."""
    shapes = next(
        operation["requestBody"]["content"]["application/json"]["schema"]["properties"]
        for method, path, operation in operations(running_app)
        if (method, path) == ("post", "/create_and_upload_image")
    )
    assert shapes["model"]["anyOf"][0]["enum"] == ["flux", "sdxl"]
    assert "euler" in shapes["scheduler"]["anyOf"][0]["enum"]
    assert set(shapes["format"]["anyOf"][0]["enum"]) == {"webp", "png", "jpeg"}
    assert (shapes["width"]["minimum"], shapes["width"]["maximum"]) == (64, 2048)
    assert shapes["prompt"]["examples"]


@pytest.mark.parametrize("keys", ["", "right"])
def test_keys_are_documented_where_they_are_needed(run_app: Callable[..., RunningApp], keys: str) -> None:
    """With API_KEYS, every operation that needs a key declares it; without, none does."""
    running_app = run_app(api_keys=keys)
    for _, path, operation in operations(running_app):
        opened = path in ("/healthz", "/readyz") or operation["operationId"] in ("file_get", "file_head")
        assert bool(operation.get("security")) == (bool(keys) and not opened), path


def test_the_page_of_the_api_is_up_to_date() -> None:
    """docs/api.md equals the output of `python -m stable_diffusion_server api`."""
    assert (ROOT / "docs" / "api.md").read_text() == describe_api()


def test_a_wrong_method_gets_the_list_of_allowed_ones(running_app: RunningApp) -> None:
    """405 lists all methods of the path in `Allow`, although each method is a separate route."""
    answer = running_app.client.patch("/create_and_upload_image")
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET, POST")
    assert running_app.client.put("/files/a").headers["allow"] == "DELETE, GET, HEAD"
