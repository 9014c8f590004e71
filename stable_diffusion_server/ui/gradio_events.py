"""What a page may send to one of the UI's events: JSON → a body of nothing but what that event takes. Pure.

Gradio copies whatever file a FileData dictionary anywhere in a body names, and opens it. No event of ours takes a
dictionary, so none is let through: a value is null, or of the one plain type its component has.
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

# By the kind of a component, what its value is. A component that is not among these cannot be an event's input.
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

    `firsts` are the values its inputs begin with: what null stands for, if there is one.
    """

    inputs: tuple[str, ...]
    triggers: frozenset[int]
    firsts: tuple[Any, ...] = ()


Events = Mapping[int, GradioEvent]


def events_of(config: Mapping[str, Any]) -> Events:
    """The events of a page out of Gradio's own configuration. Raises `ValueError` for an input of an unknown kind."""
    kinds = {component["id"]: component["type"] for component in config["components"]}
    values = {component["id"]: component.get("props", {}).get("value") for component in config["components"]}
    events: dict[int, GradioEvent] = {}
    for dependency in config["dependencies"]:
        inputs = [kinds[number] for number in dependency["inputs"]]
        if unknown := set(inputs) - set(_TYPES):
            raise ValueError(f"No component of the kind {sorted(unknown)} may be an event's input.")
        triggers = frozenset(number for number, _ in dependency["targets"] if number is not None)
        if (first := events.get(dependency.get("trigger_after"))) is not None:
            triggers |= first.triggers  # what follows another event comes with that one's trigger
        types = tuple(_TYPES[kind] for kind in inputs)
        firsts = tuple(_first(values[number], kind) for number, kind in zip(dependency["inputs"], types, strict=True))
        events[dependency["id"]] = GradioEvent(types, triggers, firsts)
    return events


def sanitized(body: bytes, events: Events) -> dict[str, Any]:
    """The body of an event with nothing in it but what the event takes, and no dictionary but `event_data`'s own.

    Raises `MalformedRequest` for what is no JSON, `InvalidInput` naming what is at fault.
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
    firsts = event.firsts or (None,) * len(data)
    return {
        "data": [first if value is None else value for value, first in zip(data, firsts, strict=True)],
        "event_data": _chosen(given.get("event_data")),
        "fn_index": number,
        "trigger_id": trigger,
        "session_hash": session,
    }


def _parsed(body: bytes) -> dict[str, Any]:
    try:
        given = json.loads(body.decode("utf-8"), parse_constant=_refuse)
        json.dumps(given, ensure_ascii=False).encode("utf-8")  # half of a surrogate pair cannot be sent on
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


def _first(value: Any, kind: str) -> Any:
    """What a component begins with, where that is a value a page may send."""
    return value if kind in ("text", "number", "yes or no") and _fits(value, kind) else None


def _is_number(value: Any) -> bool:
    # Of infinity and what is no number neither comparison holds.
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
    """What was chosen, of all that components tell of it: its index and its label. The rest goes no further."""
    fields = given if isinstance(given, dict) else {}
    index, value = fields.get("index"), fields.get("value")
    return {
        "index": index if _is_index(index) else None,
        "value": value if isinstance(value, str) and len(value) <= _LONGEST_LABEL else None,
    }
