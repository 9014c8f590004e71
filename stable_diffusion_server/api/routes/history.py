"""The door to the history: what was drawn here, newest first, searched by words of the prompt. Draws nothing."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime

from fastapi import APIRouter, Request, Response
from starlette.concurrency import run_in_threadpool

from stable_diffusion_server.api.dependencies import caller_of
from stable_diffusion_server.api.json_responses import JSONResponse
from stable_diffusion_server.concurrency import FairRequestQueue
from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.generation import ImageLibrary
from stable_diffusion_server.storage import HistoryEntry, HistoryQuery

_MOST, _USUAL = 200, 50
# Searches that run at a time, and those of one caller that run or wait.
AT_ONCE, MOST_ASKED = 2, 16
_NUMBER_MAX = 2**63 - 1
_LENGTHS = {"q": 1000, "model": 100}
_PARAMETERS = {
    "q": {"type": "string", "description": "Words the prompt holds, in any letter case.", "maxLength": _LENGTHS["q"]},
    "model": {
        "type": "string",
        "description": "Name of the model that drew them, as `/v1/models` has it.",
        "maxLength": _LENGTHS["model"],
    },
    "limit": {"type": "integer", "description": "Most pictures.", "minimum": 1, "maximum": _MOST, "default": _USUAL},
    "before": {"type": "integer", "description": "The `next` of an answer: goes on behind it.", "minimum": 1},
}
_DOCUMENTED = {
    "parameters": [
        {"name": name, "in": "query", "required": False, "description": shape.pop("description"), "schema": shape}
        for name, shape in ({name: dict(shape) for name, shape in _PARAMETERS.items()}).items()
    ]
}


def history_router(shelf: ImageLibrary, url_of: Callable[[Request, str], str]) -> APIRouter:
    """The door over a shelf; `url_of` makes the URL of a key for the client at hand."""
    routes = APIRouter(tags=["operate"])
    searches = FairRequestQueue(AT_ONCE, MOST_ASKED, f"{MOST_ASKED} of your searches are under way.")

    @routes.get(
        "/history",
        summary="Pictures drawn here, newest first",
        operation_id="history",
        openapi_extra=_DOCUMENTED,
        response_model=None,
    )
    async def history(request: Request) -> Response:
        wanted = _wanted(request)
        async with searches.hold(caller_of(request).share):
            entries = await run_in_threadpool(shelf.search, caller_of(request), wanted)
        pictures = [{"path": url_of(request, entry.key), **_shown(entry)} for entry in entries]
        return JSONResponse(
            {"pictures": pictures, "next": entries[-1].number if len(entries) == wanted.limit else None}
        )

    return routes


def _wanted(request: Request) -> HistoryQuery:
    given = request.query_params
    faults = [(name[:100], f"{name[:100]} is not a parameter here.") for name in given if name not in _PARAMETERS]
    faults += [
        (name, f"{name} must not be longer than {most} characters.")
        for name, most in _LENGTHS.items()
        if len(given.get(name, "")) > most
    ]
    numbers: dict[str, int] = {}
    for name, most in (("limit", _MOST), ("before", _NUMBER_MAX)):
        if (text := given.get(name)) is not None:
            if not (text.isascii() and text.isdigit() and len(text) < 20 and 1 <= int(text) <= most):
                faults.append((name, f"{name} must be a whole number from 1 to {most}."))
            else:
                numbers[name] = int(text)
    if faults:
        raise InvalidInput.from_faults(faults)
    return HistoryQuery(
        text=given.get("q", ""),
        model=given.get("model", ""),
        before=numbers.get("before"),
        limit=numbers.get("limit", _USUAL),
    )


def _shown(entry: HistoryEntry) -> dict[str, object]:
    return {
        "key": entry.key,
        "prompt": entry.prompt,
        "model": entry.model,
        "task": entry.task,
        "seed": entry.seed,
        "width": entry.width,
        "height": entry.height,
        "caller": entry.caller,
        "drawn_at": datetime.fromtimestamp(entry.drawn_at, UTC).isoformat(timespec="seconds"),
        "digest": entry.digest,
        "number": entry.number,
    }
