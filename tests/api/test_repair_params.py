"""The parameter `repairs` is a list of objects, bounded before it is read, and every field at fault is named."""

from __future__ import annotations

import json
from typing import Any

import pytest
from conftest import RunningApp

ROUTE = "/create_and_upload_image"


def refused(app: RunningApp, repairs: Any, **more: Any) -> dict[str, str]:
    response = app.client.post(ROUTE, json={"prompt": "red", "width": 64, "height": 64, "repairs": repairs, **more})
    assert response.status_code in (400, 413, 422), response.text
    body = response.json()
    return {fault["field"]: fault["detail"] for fault in body.get("errors", [])} or {
        body.get("field", ""): body["detail"]
    }


def test_every_field_at_fault_is_named(running_app: RunningApp) -> None:
    """Within entries, beside other parameters."""
    repairs = [{"detector": "faces", "confidence": 2}, {"strength": "x", "detector": "hands", "extra": 1}, 7]
    assert {*refused(running_app, repairs, width=1)} == {
        "repairs[0].confidence",
        "repairs[1].strength",
        "repairs[1].extra",
        "repairs[2]",
        "width",
    }


@pytest.mark.parametrize(
    "repairs",
    [
        "faces",
        {"detector": "faces"},
        [{"detector": "faces"}] * 5,
        [{"detector": ""}],
        [{"detector": "x" * 201}],
        [{"detector": "faces", "prompt": ["a"] * 17}],
        [{"detector": "faces", "prompt": "x" * 32_001}],
        [{"detector": "faces", "most": 2.5}],
        [{"detector": "faces", "most": True}],
        [{"detector": "faces", "steps": 10**30}],
        [{"detector": "faces", "padding": -1}],
        [[[[[]]]]],
        True,
        7,
    ],
)
def test_what_is_no_list_of_repairs_is_refused(running_app: RunningApp, repairs: Any) -> None:
    """Before anything is drawn."""
    assert all(field.startswith("repairs") for field in refused(running_app, repairs))
    assert not running_app.squares.prepared


@pytest.mark.parametrize(
    "text",
    ['[{"detector":"faces"}', '[],"x":1', "[NaN]", "[" * 50_000, "x" * 100_001, '[{"detector":"a","detector":"b"}]'],
)
def test_a_malformed_text_in_a_form_is_refused(running_app: RunningApp, text: str) -> None:
    """In linear time."""
    data = {"prompt": "red", "width": "64", "height": "64", "repairs": text}
    response = running_app.client.post(ROUTE, data=data)
    assert response.status_code == 422
    assert response.json()["field"].startswith("repairs")


@pytest.mark.parametrize("text", ["", "[]", " "])
def test_an_empty_list_is_as_if_left_out(running_app: RunningApp, text: str) -> None:
    """The key is the same."""
    data = {"prompt": "red", "width": "64", "height": "64"}
    plain, empty = (running_app.client.post(ROUTE, data=sent).json() for sent in (data, {**data, "repairs": text}))
    assert plain["path"] == empty["path"]


@pytest.mark.parametrize("name", ["faces", "../faces", "/etc/passwd", "file:///etc/passwd", "http://127.0.0.1/x"])
def test_a_server_without_detectors_says_so(running_app: RunningApp, name: str) -> None:
    """A name is never a path or an address."""
    for text in ([{"detector": name}], json.dumps([{"detector": name}])):
        response = running_app.client.post(ROUTE, json={"prompt": "red", "width": 64, "height": 64, "repairs": text})
        assert (response.status_code, response.json()["field"]) == (422, "repairs[0].detector")
