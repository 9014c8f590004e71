"""Validates the body of a Gradio event and rebuilds it from the values that the event takes.

Gradio copies and opens any file that a FileData dictionary in a body names. No event of this UI takes a dictionary, so
all dictionaries are rejected: a value is null or has the one plain type of its component.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stable_diffusion_server.errors import InvalidInput, MalformedRequest

SESSION = re.compile(r"[A-Za-z0-9]{1,64}")

_LARGEST = 2**53
_MOST_ITEMS, _LONGEST_ITEM = 64, 128
_LONGEST_LABEL = 200

# Type of the value by component class. Other components cannot be inputs of events.
_TYPES: Mapping[str, str] = {
    "textbox": "text",
    "dropdown": "text",
    "radio": "text",
    "html": "text",
    "number": "number",
    "slider": "number",
    "checkbox": "yes or no",
    "dataset": "index",
    "browserstate": "list of texts",
    "state": "nothing",
}


@dataclass(frozen=True, slots=True)
class GradioEvent:
    """An event of the page: the type of each of its inputs, and the ids of the components that trigger it.

    `defaults` are the initial values of its inputs, which replace null.
    """

    inputs: tuple[str, ...]
    triggers: frozenset[int]
    defaults: tuple[Any, ...] = ()


Events = Mapping[int, GradioEvent]


def events_of(config: Mapping[str, Any]) -> Events:
    """Read the events of a page from Gradio's configuration. Raises `ValueError` for an input of an unknown kind."""
    kinds = {component["id"]: component["type"] for component in config["components"]}
    values = {component["id"]: component.get("props", {}).get("value") for component in config["components"]}
    events: dict[int, GradioEvent] = {}
    for dependency in config["dependencies"]:
        inputs = [kinds[number] for number in dependency["inputs"]]
        if unknown := set(inputs) - set(_TYPES):
            raise ValueError(f"No component of the kind {sorted(unknown)} may be an event's input.")
        triggers = frozenset(number for number, _ in dependency["targets"] if number is not None)
        if (first := events.get(dependency.get("trigger_after"))) is not None:
            triggers |= first.triggers  # a chained event arrives with the first one's trigger
        types = tuple(_TYPES[kind] for kind in inputs)
        defaults = tuple(
            _default(values[number], kind) for number, kind in zip(dependency["inputs"], types, strict=True)
        )
        events[dependency["id"]] = GradioEvent(types, triggers, defaults)
    return events


def sanitized(body: bytes, events: Events) -> dict[str, Any]:
    """Return the body of an event, rebuilt from validated values. `event_data` is the only dictionary.

    Raises `MalformedRequest` for invalid JSON, and `InvalidInput` with the name of a wrong field.
    """
    given = _parsed(body)
    number: Any = given.get("fn_index")
    event = events.get(number) if _is_index(number) else None
    if event is None:
        raise InvalidInput("fn_index is no event of this page.", field="fn_index")
    session, trigger, data = given.get("session_hash"), given.get("trigger_id"), given.get("data")
    if not isinstance(session, str) or not SESSION.fullmatch(session):
        raise InvalidInput("session_hash must be 1 to 64 letters and digits.", field="session_hash")
    if trigger is not None and not (_is_index(trigger) and trigger in event.triggers):
        raise InvalidInput("trigger_id is no component that triggers this event.", field="trigger_id")
    if not isinstance(data, list) or len(data) != len(event.inputs):
        raise InvalidInput(f"data must be a list of {len(event.inputs)} values.", field="data")
    for place, (value, kind) in enumerate(zip(data, event.inputs, strict=True)):
        if not _fits(value, kind):
            raise InvalidInput(f"data[{place}] must be {kind}, or null.", field=f"data[{place}]")
    defaults = event.defaults or (None,) * len(data)
    return {
        "data": [first if value is None else value for value, first in zip(data, defaults, strict=True)],
        "event_data": _chosen(given.get("event_data")),
        "fn_index": number,
        "trigger_id": trigger,
        "session_hash": session,
    }


def _parsed(body: bytes) -> dict[str, Any]:
    try:
        given = json.loads(body.decode("utf-8"), parse_constant=_refuse)
        json.dumps(given, ensure_ascii=False).encode("utf-8")  # a lone surrogate cannot be forwarded
    except (ValueError, RecursionError) as error:
        raise MalformedRequest("The body is no JSON.") from error
    if not isinstance(given, dict):
        raise MalformedRequest("The body is no JSON object.")
    return given


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON.")


def _fits(value: Any, kind: str) -> bool:
    if value is None:
        return True
    match kind:
        case "text":
            return isinstance(value, str)
        case "number":
            return _is_number(value)
        case "yes or no":
            return isinstance(value, bool)
        case "index":
            return _is_index(value)
        case "list of texts":
            return _is_short_list(value)
        case _:
            return False


def _default(value: Any, kind: str) -> Any:
    """Return the initial value of a component, `None` if a page could not send that value."""
    return value if kind in ("text", "number", "yes or no") and _fits(value, kind) else None


def _is_number(value: Any) -> bool:
    # The comparisons also exclude infinity and NaN.
    return isinstance(value, int | float) and not isinstance(value, bool) and -_LARGEST <= value <= _LARGEST


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _LARGEST


def _is_short_list(value: Any) -> bool:
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and len(value) <= _MOST_ITEMS
        and all(isinstance(item, str) and len(item) <= _LONGEST_ITEM for item in value)
    )


def _chosen(given: Any) -> dict[str, Any]:
    """Return only index and label of a selection; other data of the event is dropped."""
    fields = given if isinstance(given, dict) else {}
    index, value = fields.get("index"), fields.get("value")
    return {
        "index": index if _is_index(index) else None,
        "value": value if isinstance(value, str) and len(value) <= _LONGEST_LABEL else None,
    }
