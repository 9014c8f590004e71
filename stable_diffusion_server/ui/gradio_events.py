"""Guards Gradio: which routes a page may call, and the body of an event, rebuilt from the values the event takes.

Gradio copies and opens any file that a FileData dictionary in a body names. No event of this UI takes a dictionary, so
all dictionaries are rejected: a value is null or has the one plain type of its component.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs

from limits import RateLimitItem
from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stable_diffusion_server.concurrency import MovingWindows
from stable_diffusion_server.errors import InvalidInput, MalformedRequest, NotFound, RateLimited, ServerError
from stable_diffusion_server.ui.asgi_transport import problem_response, read_body

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
EVENT_BYTES = 65_536
# Maximum number of open streams per visitor: two for each open page.
STREAMS = 64
_NAME = r"[A-Za-z0-9_-][A-Za-z0-9_.-]*"
_PAGE = re.compile(r"/ui/")
_FILES = re.compile(rf"/ui/(?:theme\.css|assets/{_NAME}|static/(?:{_NAME}/)*{_NAME})")
_HEARTBEAT = re.compile(r"/ui/gradio_api/heartbeat/(?P<session>[A-Za-z0-9]{1,64})")
_EVENT_STREAM, _EVENT = "/ui/gradio_api/queue/data", "/ui/gradio_api/queue/join"
# Forwarded headers. Gradio trusts others, which name users, hosts and folders.
_HEADERS = frozenset(
    b"host cookie accept accept-encoding content-type user-agent if-none-match if-modified-since".split()
)


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


class GradioGuard:
    """ASGI middleware in front of the application with Gradio, with an allowlist of routes.

    All other routes get 404, so that a new version of Gradio adds no open route. `events` are the events of the pages;
    `owner` returns a visitor's name, `rate` limits the events per visitor. Session names include the visitor's name, so
    that a visitor cannot use another visitor's session.
    """

    def __init__(
        self, app: ASGIApp, events: Events, owner: Callable[[Scope], str], rate: RateLimitItem | None = None
    ) -> None:
        self._app = app
        self._events = events
        self._owner = owner
        self._rate = rate
        self._events_sent = MovingWindows()
        self._streams: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward an admitted request, or respond with an error."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            try:
                await self._admit(scope, receive, send)
            except ServerError as error:
                await problem_response(error)(scope, receive, send)
        else:
            raise NotFound("There is nothing here.")

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward a request. If it is not admitted, raises a `ServerError` before it sends anything."""
        method, path, query_string = scope["method"], scope["path"], scope["query_string"]
        scope = {**scope, "headers": [pair for pair in scope["headers"] if pair[0] in _HEADERS], "query_string": b""}
        if method in ("GET", "HEAD") and path == "/ui":
            await RedirectResponse("/ui/")(scope, receive, send)
        elif method in ("GET", "HEAD") and (_PAGE.fullmatch(path) or _FILES.fullmatch(path)):
            await self._app(scope, _without_body(receive), send)
        elif method == "GET" and (heartbeat := _HEARTBEAT.fullmatch(path)):
            owner = self._owner(scope)
            path = f"/ui/gradio_api/heartbeat/{_session_of(owner, heartbeat['session'])}"
            await self._stream(owner, {**scope, "path": path, "raw_path": path.encode()}, receive, send)
        elif method == "GET" and path == _EVENT_STREAM:
            owner = self._owner(scope)
            query = f"session_hash={_session_of(owner, _session(query_string))}".encode()
            await self._stream(owner, {**scope, "query_string": query}, receive, send)
        elif method == "POST" and path == _EVENT:
            await self._event(scope, receive, send)
        else:
            raise NotFound("There is nothing here.")

    async def _event(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward an event with a body built from the validated values."""
        owner = self._owner(scope)
        if self._rate is not None and not self._events_sent.hit(owner, self._rate):
            _, seconds = self._events_sent.remaining(owner, self._rate)
            allowed = f"{self._rate.amount} events in {self._rate.get_expiry()} s are allowed."
            raise RateLimited(allowed, retry_after=max(1, math.ceil(seconds)))
        event = sanitized(await read_body(receive, EVENT_BYTES), self._events)
        event["session_hash"] = _session_of(owner, event["session_hash"])
        body = json.dumps(event).encode()
        more = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        headers = [pair for pair in scope["headers"] if pair[0] != b"content-type"] + more
        await self._app({**scope, "headers": headers}, _with_body(body, receive), send)

    async def _stream(self, owner: str, scope: Scope, receive: Receive, send: Send) -> None:
        if self._streams[owner] >= STREAMS:
            raise RateLimited(f"{STREAMS} streams at a time are allowed here.", retry_after=5)
        self._streams[owner] += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._streams[owner] -= 1
            if not self._streams[owner]:
                del self._streams[owner]


def _session_of(owner: str, session: str) -> str:
    """Return the name of a visitor's session; another visitor cannot produce the same name."""
    return hashlib.sha256(f"{owner}\n{session}".encode()).hexdigest()[:40]


def _session(query: bytes) -> str:
    """Return the session name in a query. Raises `InvalidInput`."""
    given = parse_qs(query.decode("latin-1"), max_num_fields=4).get("session_hash", [])
    if len(given) != 1 or not SESSION.fullmatch(given[0]):
        raise InvalidInput("session_hash must be 1 to 64 letters and digits.", field="session_hash")
    return given[0]


def _with_body(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that yields this body first, then the messages of the original one."""
    sent = False

    async def receive_body() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive_body


def _without_body(receive: Receive) -> Receive:
    return _with_body(b"", receive)
