"""The log: one line of JSON for each request, with its id and the name of the key, and no prompt unless asked for."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from conftest import House

CREATE = "/create_and_upload_image"
KEY = {"X-API-Key": "secret-of-anna", "X-Request-ID": "the-id"}
ORDER = {"prompt": "a confidential red square", "width": 64, "height": 64}


def lines(logged: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in logged.splitlines() if line.startswith("{")]


def test_a_request_is_one_line_with_its_id_key_and_reason(
    house_of: Callable[..., House], capfd: pytest.CaptureFixture[str]
) -> None:
    """The path without its query, since that holds the prompt; what the request led to carries the same id."""
    house = house_of(api_keys="anna:secret-of-anna", log_format="json")
    house.client.get(CREATE, params=ORDER, headers=KEY)
    house.client.get(CREATE, params={**ORDER, "width": 1}, headers=KEY)
    logged = "".join(capfd.readouterr())
    told = [line for line in lines(logged) if line.get("request_id") == "the-id"]
    requests = [line for line in told if line["event"] == "request" and line["path"] == CREATE]
    assert [(line["status"], line["key"], line.get("reason")) for line in requests] == [
        (200, "anna", None),
        (422, "anna", "invalid-input"),
    ]
    (stored,) = [line for line in told if line["event"] == "picture stored"]
    assert (stored["key"], "prompt" in stored) == ("anna", False)
    assert stored["name"].startswith("static/uploads/")
    assert not [word for word in ("confidential", "secret-of-anna") if word in logged]


def test_prompts_are_logged_where_the_operator_says_so(
    house_of: Callable[..., House], capfd: pytest.CaptureFixture[str]
) -> None:
    """LOG_PROMPTS=1: with the picture they led to, and nowhere else."""
    house = house_of(log_prompts=True, log_format="json")
    house.client.get(CREATE, params=ORDER)
    with_prompt = [line for line in lines("".join(capfd.readouterr())) if "confidential" in json.dumps(line)]
    assert [(line["event"], line["prompt"]) for line in with_prompt] == [("picture stored", ORDER["prompt"])]
