"""Events that a component or our code cannot handle: one log line each, without a traceback."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import free_port, start_server
from test_ui_attacks import SERVE, Visitor, environment_of, visit

pytestmark = pytest.mark.slow

CANARY = "canary-in-a-choice"
# Of the right type, but no page sends them.
ODD: dict[str, list[Any]] = {
    "dropdown": [CANARY, "", "\u202e\0"],
    "radio": [CANARY, "x", "9" * 400],
    "textbox": ["\n" * 900, "\0", "1e999"],
    "html": [CANARY, "," * 900, "a,b"],
    "number": [-1, 2**53, 0.5, -0.0],
    "slider": [-1, 10**9, 0.3],
    "checkbox": [True, False],
    "dataset": [10**6, 2**53],
    "browserstate": [["x"] * 64, [CANARY], []],
}


@pytest.fixture(scope="module")
def visitor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Visitor]:
    """The operator's browser."""
    folder, port = tmp_path_factory.mktemp("operator"), free_port()
    server = start_server(folder, port, *SERVE, PORT=str(port), LOG_FORMAT="json", **environment_of("operator", folder))
    found = visit(server, "operator")
    yield found
    found.http.close()
    server.stop()


def run(visitor: Visitor, name: str, rows: list[tuple[dict[str, Any], list[Any], Any]]) -> list[dict[str, Any]]:
    """Send the events, wait for their ends; return the log lines, each of which is JSON."""
    before = visitor.server.log.stat().st_size
    for number, (event, data, chosen) in enumerate(rows):
        session = f"{name}{number}"
        assert visitor.send(event, data, session, {"event_data": chosen}).status_code == 200
        visitor.news(session)
    with visitor.server.log.open("rb") as log:
        log.seek(before)
        return [json.loads(line) for line in log.read().splitlines()]


def kinds_of(visitor: Visitor, event: dict[str, Any]) -> list[str]:
    return [visitor.components[number]["type"] for number in event["inputs"]]


def failed(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [line for line in lines if line["event"].startswith("an event of the UI")]


@pytest.mark.fault(175)
@pytest.mark.timeout(300)
def test_null_in_every_field_of_every_event_is_what_the_field_begins_with(visitor: Visitor) -> None:
    """A page that sends null for its fields instead of the values: no event fails."""
    events = [event for event in visitor.events if event["backend_fn"]]
    assert len(events) > 20
    for chosen in (None, {"index": None, "value": None}):
        reported = failed(
            run(visitor, f"null{chosen is None}x", [(event, [None] * len(event["inputs"]), chosen) for event in events])
        )
        assert reported == []


@pytest.mark.fault(175)
@pytest.mark.timeout(300)
def test_what_gradio_cannot_take_is_one_line_without_the_text(visitor: Visitor) -> None:
    """Invalid choices, rows out of range, odd numbers: JSON log lines without any text of a visitor."""
    rows = []
    for event in visitor.events:
        columns = [ODD.get(kind, [None]) for kind in kinds_of(visitor, event)]
        if event["backend_fn"] and columns:
            longest = max(map(len, columns))
            turns = [list(itertools.islice(itertools.cycle(column), longest)) for column in columns]
            rows += [(event, list(data), {"index": 10**6, "value": CANARY}) for data in zip(*turns, strict=True)]
    lines = run(visitor, "odd", rows)
    reported = failed(lines)
    assert 0 < len(reported) <= len(rows)
    assert CANARY not in json.dumps(reported)
