"""The log: one JSON line per request, with its id and the key's name, without prompts by default."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import structlog
from conftest import RunningApp

from stable_diffusion_server.observability.logs import MAX_TRACEBACK, MAX_VALUE, configure_logging, shorten_values

pytestmark = pytest.mark.slow

CREATE = "/create_and_upload_image"
KEY = {"X-API-Key": "secret-of-anna", "X-Request-ID": "the-id"}
ORDER = {"prompt": "a confidential red square", "width": 64, "height": 64}


def lines(logged: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in logged.splitlines() if line.startswith("{")]


def test_a_request_is_one_line_with_its_id_key_and_reason(
    run_app: Callable[..., RunningApp], capfd: pytest.CaptureFixture[str]
) -> None:
    """The path without its query, which holds the prompt; later lines of the request carry the same id."""
    running_app = run_app(api_keys="anna:secret-of-anna", log_format="json")
    running_app.client.get(CREATE, params=ORDER, headers=KEY)
    running_app.client.get(CREATE, params={**ORDER, "width": 1}, headers=KEY)
    logged = "".join(capfd.readouterr())
    reported = [line for line in lines(logged) if line.get("request_id") == "the-id"]
    requests = [line for line in reported if line["event"] == "request" and line["path"] == CREATE]
    assert [(line["status"], line["key"], line.get("reason")) for line in requests] == [
        (200, "anna", None),
        (422, "anna", "invalid-input"),
    ]
    (stored,) = [line for line in reported if line["event"] == "picture stored"]
    assert (stored["key"], "prompt" in stored) == ("anna", False)
    assert stored["name"].startswith("static/uploads/")
    assert not [word for word in ("confidential", "secret-of-anna") if word in logged]


def test_prompts_are_logged_where_the_operator_says_so(
    run_app: Callable[..., RunningApp], capfd: pytest.CaptureFixture[str]
) -> None:
    """LOG_PROMPTS=1: on the line of the generated image, and nowhere else."""
    running_app = run_app(log_prompts=True, log_format="json")
    running_app.client.get(CREATE, params=ORDER)
    with_prompt = [line for line in lines("".join(capfd.readouterr())) if "confidential" in json.dumps(line)]
    assert [(line["event"], line["prompt"]) for line in with_prompt] == [("picture stored", ORDER["prompt"])]


@pytest.mark.fault(171)
@pytest.mark.parametrize(
    ("path", "headers"),
    [
        ("/x" + "%ff" * 20_000, {"Host": "elsewhere.example"}),
        ("/" + "a" * 60_000, {}),
        ("/files/" + "%F0%9F%98%80" * 5_000, {}),
        ("/jobs/" + "%00" * 20_000, {}),
        ("/docs/" + "%22%5C" * 10_000, {"Origin": "https://" + "e" * 9_000}),
    ],
)
def test_no_request_makes_a_long_line(
    run_app: Callable[..., RunningApp], capfd: pytest.CaptureFixture[str], path: str, headers: dict[str, str]
) -> None:
    """A path of 60 KB, refused or not found, costs a few kilobytes, also after JSON escaping."""
    running_app = run_app(log_format="json")
    capfd.readouterr()
    running_app.client.get(path, headers=headers)
    logged = "".join(capfd.readouterr()).splitlines()
    assert [json.loads(line)["event"] for line in logged if line.startswith("{")][-1] == "request"
    assert max(map(len, logged)) < 12 * MAX_VALUE + 1000


@pytest.mark.parametrize(
    "odd", ["\x1b[2J", "\x1b]0;title\x07", "\u009b31m", "\u202e", "\u2028", "\r\n", "\x00", "\ufffe"]
)
@pytest.mark.parametrize("place", ["path", "exception"])
def test_a_terminal_gets_no_order_from_a_caller(capfd: pytest.CaptureFixture[str], odd: str, place: str) -> None:
    """LOG_FORMAT=console: what is not printable is escaped, in texts and in the messages of errors."""
    before = structlog.get_config()
    try:
        configure_logging("info", "console")
        log = structlog.get_logger()
        if place == "path":
            log.info("request", path=f"/v1/models/a{odd}b")
        else:
            log.error("failed", exc_info=ValueError(f"a{odd}b"))
    finally:
        structlog.configure(**before)
    colours = re.compile(r"\x1b\[[0-9]*m")
    logged = colours.sub("", "".join(capfd.readouterr()))
    assert odd[0].encode("unicode_escape").decode() in logged
    assert all(line.isprintable() for line in logged.split("\n"))


@pytest.mark.fault(171)
def test_a_text_at_the_limit_stays_whole_and_a_longer_one_tells_its_length() -> None:
    """Both sides of the limit, for strings, other values, and a traceback, which keeps its end."""
    line: dict[str, Any] = {
        "at": "a" * MAX_VALUE,
        "over": "a" * (MAX_VALUE + 1),
        "listed": ["b"] * MAX_VALUE,
        "number": 7,
        "exception": "c" * MAX_TRACEBACK + "Error: the end",
        "prompt": "d" * (MAX_VALUE + 1),
    }
    cut = shorten_values(None, "info", dict(line))
    assert (cut["at"], cut["number"], cut["prompt"]) == (line["at"], 7, line["prompt"])
    assert cut["over"] == "a" * MAX_VALUE + f"… ({MAX_VALUE + 1} characters)"
    assert cut["listed"].endswith(" characters)")
    assert len(cut["listed"]) < MAX_VALUE + 40
    assert cut["exception"].endswith("Error: the end")
    assert len(cut["exception"]) < MAX_TRACEBACK + 40
