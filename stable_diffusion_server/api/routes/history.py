"""Route of the history: images generated here, newest first, searched by words of the prompt."""

from __future__ import annotations

from datetime import UTC, datetime

from fastapi import APIRouter, Request, Response
from starlette.concurrency import run_in_threadpool

from stable_diffusion_server.api.dependencies import UrlOf, caller_of
from stable_diffusion_server.api.http_responses import JSONResponse
from stable_diffusion_server.api.openapi.document import query_parameter
from stable_diffusion_server.api.schemas.responses import HistoryEntryBody, HistoryPageBody, described
from stable_diffusion_server.concurrency import FairRequestQueue
from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.generation import ImageLibrary
from stable_diffusion_server.storage import HistoryEntry, HistoryQuery

_LIMIT_MAX, _LIMIT_DEFAULT = 200, 50
# Maximum concurrent searches; maximum running and waiting searches per caller.
CONCURRENCY, MAX_PER_CALLER = 2, 16
_NUMBER_MAX = 2**63 - 1
_LENGTHS = {"q": 1000, "model": 100}
_PARAMETERS = {
    "q": {"type": "string", "description": "Words in the prompt, ignoring case.", "maxLength": _LENGTHS["q"]},
    "model": {
        "type": "string",
        "description": "Name of the model, as in `/v1/models`.",
        "maxLength": _LENGTHS["model"],
    },
    "limit": {
        "type": "integer",
        "description": "Maximum number of images.",
        "minimum": 1,
        "maximum": _LIMIT_MAX,
        "default": _LIMIT_DEFAULT,
    },
    "before": {"type": "integer", "description": "The `next` of the previous page.", "minimum": 1},
}


def history_router(library: ImageLibrary, url_of: UrlOf) -> APIRouter:
    """Return the route; `url_of` makes the URL of an object key."""
    routes = APIRouter(tags=["operate"])
    searches = FairRequestQueue(CONCURRENCY, MAX_PER_CALLER, f"{MAX_PER_CALLER} of your searches are under way.")

    @routes.get(
        "/history",
        summary="Images generated here, newest first",
        operation_id="history",
        openapi_extra={"parameters": [query_parameter(name, schema) for name, schema in _PARAMETERS.items()]},
        response_model=None,
        responses={200: {"model": described(HistoryPageBody)}},
    )
    async def history(request: Request) -> Response:
        query = _query_of(request)
        async with searches.hold(caller_of(request).share):
            entries = await run_in_threadpool(library.search, caller_of(request), query)
        page: HistoryPageBody = {
            "pictures": [_entry_body(entry, url_of(request, entry.key)) for entry in entries],
            "next": entries[-1].number if len(entries) == query.limit else None,
        }
        return JSONResponse(page)

    return routes


def _query_of(request: Request) -> HistoryQuery:
    """Read the query string. Raises `InvalidInput`, which names every invalid parameter."""
    given = request.query_params
    faults = [(name[:100], f"{name[:100]} is not a parameter here.") for name in given if name not in _PARAMETERS]
    faults += [
        (name, f"{name} must not be longer than {most} characters.")
        for name, most in _LENGTHS.items()
        if len(given.get(name, "")) > most
    ]
    numbers: dict[str, int] = {}
    for name, most in (("limit", _LIMIT_MAX), ("before", _NUMBER_MAX)):
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
        limit=numbers.get("limit", _LIMIT_DEFAULT),
    )


def _entry_body(entry: HistoryEntry, url: str) -> HistoryEntryBody:
    return {
        "path": url,
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
