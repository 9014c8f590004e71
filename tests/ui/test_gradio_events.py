"""Validation of the events a page may send to the UI. Pure functions."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stable_diffusion_server.errors import ServerError
from stable_diffusion_server.ui.gradio_events import GradioEvent, events_of, sanitized

EVENTS = {
    3: GradioEvent(("text", "number", "yes or no", "index", "list of texts", "nothing"), frozenset({7})),
    4: GradioEvent((), frozenset({8})),
}
GOOD: dict[str, Any] = {
    "data": ["a", 1.5, True, 0, ["id"], None],
    "event_data": {"index": 2, "value": "Status"},
    "fn_index": 3,
    "trigger_id": 7,
    "session_hash": "abc123",
}
FILE = {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}


def sent(**changes: Any) -> bytes:
    return json.dumps({**GOOD, **changes}).encode()


def test_what_an_event_takes_is_passed_on_and_nothing_else() -> None:
    """The five known members pass unchanged; null replaces any value; other members are dropped."""
    assert sanitized(sent(), EVENTS) == GOOD
    more = {
        "oauth_token": "x",
        "batched": True,
        "simple_format": True,
        "request": FILE,
        "event_id": "1",
        "api_name": "a",
    }
    assert sanitized(sent(**more), EVENTS) == GOOD
    assert sanitized(sent(data=[None] * 6, event_data=None, trigger_id=None), EVENTS)["data"] == [None] * 6
    reported = {"index": 1, "value": {"image": FILE}, "selected": FILE, "path": "/etc/passwd"}
    assert sanitized(sent(event_data=reported), EVENTS)["event_data"] == {"index": 1, "value": None}


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a file": ({"data": [FILE, 1.5, True, 0, [], None]}, "data[0]"),
    "a file in a list": ({"data": ["a", 1.5, True, 0, [FILE], None]}, "data[4]"),
    "a list for a text": ({"data": [["/etc/passwd"], 1.5, True, 0, [], None]}, "data[0]"),
    "a text for a number": ({"data": ["a", "1", True, 0, [], None]}, "data[1]"),
    "a huge number": ({"data": ["a", 10**400, True, 0, [], None]}, "data[1]"),
    "a number for yes or no": ({"data": ["a", 1.5, 1, 0, [], None]}, "data[2]"),
    "a negative index": ({"data": ["a", 1.5, True, -1, [], None]}, "data[3]"),
    "very many texts": ({"data": ["a", 1.5, True, 0, ["x"] * 65, None]}, "data[4]"),
    "a long text in a list": ({"data": ["a", 1.5, True, 0, ["x" * 129], None]}, "data[4]"),
    "a state": ({"data": ["a", 1.5, True, 0, [], [FILE]]}, "data[5]"),
    "too few values": ({"data": []}, "data"),
    "too many values": ({"data": [None] * 7}, "data"),
    "values by name": ({"data": {"0": FILE}}, "data"),
    "an event of another page": ({"fn_index": 5}, "fn_index"),
    "an event by name": ({"fn_index": "draw"}, "fn_index"),
    "no event": ({"fn_index": None}, "fn_index"),
    "yes for an event": ({"fn_index": True}, "fn_index"),
    "a trigger of another event": ({"trigger_id": 8}, "trigger_id"),
    "a path for a session": ({"session_hash": "../x"}, "session_hash"),
    "no session": ({"session_hash": None}, "session_hash"),
    "a file for a session": ({"session_hash": FILE}, "session_hash"),
}


@pytest.mark.fault(100)
@pytest.mark.parametrize("name", WRONG)
def test_what_an_event_does_not_take_is_refused_by_name(name: str) -> None:
    """422 that names the member."""
    changes, field = WRONG[name]
    with pytest.raises(ServerError) as raised:
        sanitized(sent(**changes), EVENTS)
    assert (raised.value.status, raised.value.field) == (422, field)


@pytest.mark.fault(103)
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"[" * 60_000,
        b'{"a":' * 12_000,
        b'{"data": [NaN]}',
        b'{"data": [Infinity]}',
        b'{"data": [1e999], "fn_index": 3, "session_hash": "a"}',
        b'{"data": ["\\ud800"]}',
        b'{"data": [' + b"9" * 60_000 + b"]}",
        b"\xff\xfe{}",
        b'{"data": []} x',
    ],
    ids=[
        "nothing",
        "list",
        "deep lists",
        "deep objects",
        "NaN",
        "infinity",
        "too large",
        "surrogate",
        "digits",
        "bytes",
        "more",
    ],
)
def test_what_is_no_json_or_too_much_of_it_is_refused(body: bytes) -> None:
    """4xx, and no unhandled error."""
    with pytest.raises(ServerError) as raised:
        sanitized(body, EVENTS)
    assert 400 <= raised.value.status < 500


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.just("/etc/passwd"),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["path", "meta", "_type", "url", "is_file", "name", "data"]), inner, max_size=4
        )
    ),
    max_leaves=12,
)


@given(st.lists(ANY, min_size=6, max_size=6), ANY)
def test_no_dictionary_ever_comes_through(data: list[Any], event_data: Any) -> None:
    """The input is refused, or contains no dictionary except the two members of `event_data`, which contain none."""
    try:
        passed = sanitized(json.dumps({**GOOD, "data": data, "event_data": event_data}).encode(), EVENTS)
    except ServerError:
        return
    chosen = passed["event_data"]
    assert chosen is None or set(chosen) == {"index", "value"}
    inside = [*passed["data"], *(chosen or {}).values()]
    assert not any(isinstance(value, dict) for value in inside)
    assert all(isinstance(item, str) for value in inside if isinstance(value, list) for item in value)


@pytest.mark.parametrize(
    "kind", ["image", "imageeditor", "file", "gallery", "json", "audio", "chatbot", "something new"]
)
def test_a_component_that_opens_files_cannot_be_an_input(kind: str) -> None:
    """Building a page with such a component fails."""
    config: Callable[[str], dict[str, Any]] = lambda type_: {  # noqa: E731  # used twice below
        "components": [{"id": 1, "type": type_}],
        "dependencies": [{"id": 0, "inputs": [1], "targets": [(1, "change")]}],
    }
    follows = {"id": 1, "inputs": [], "targets": [(None, "then")], "trigger_after": 0}
    both = {**config("textbox"), "dependencies": [*config("textbox")["dependencies"], follows]}
    assert events_of(both) == {0: GradioEvent(("text",), frozenset({1}), (None,)), 1: GradioEvent((), frozenset({1}))}
    with pytest.raises(ValueError, match=kind):
        events_of(config(kind))
