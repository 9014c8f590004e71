"""The doors to jobs: how one stands, what happens to it, and cancelling it. Draws nothing."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from fastapi import APIRouter, Request, Response

from stable_diffusion_server.api.dependencies import caller_of
from stable_diffusion_server.api.event_stream import EventResponse, FollowerLimiter
from stable_diffusion_server.api.json_responses import JSONResponse
from stable_diffusion_server.api.previews import EncodedPreviews
from stable_diffusion_server.api.schemas.wire import job_body
from stable_diffusion_server.jobs import JobEvent, JobManager
from stable_diffusion_server.parsing import dumps
from stable_diffusion_server.types import Format

UrlOf = Callable[[Request, str], str]

_NO_STORE = {"Cache-Control": "no-store"}


def jobs_router(jobs: JobManager, url_of: UrlOf, followers: FollowerLimiter, previews: EncodedPreviews) -> APIRouter:
    """The doors to jobs; `url_of` makes the URL of a key for the client at hand.

    `followers` bounds who follows at a time; `previews` encodes for all of them.
    """
    routes = APIRouter(prefix="/jobs", tags=["jobs"])

    def urls_for(request: Request) -> Callable[[str], str]:
        return lambda key: url_of(request, key)

    @routes.get("", summary="Your latest accepted jobs, newest first", operation_id="list_jobs", response_model=None)
    async def list_jobs(request: Request) -> Response:
        told = [job_body(standing, urls_for(request)) for standing in await jobs.list_jobs(caller_of(request))]
        return JSONResponse({"jobs": told}, headers=_NO_STORE)

    @routes.get("/{job_id}", summary="How a job stands", operation_id="get_job", response_model=None)
    async def status(request: Request, job_id: str) -> Response:
        found = await jobs.status(job_id, caller_of(request))
        return JSONResponse(job_body(found, urls_for(request)), headers=_NO_STORE)

    @routes.delete(
        "/{job_id}",
        summary="Cancel a job; one that has ended stays as it is",
        operation_id="cancel_job",
        response_model=None,
    )
    async def cancel(request: Request, job_id: str) -> Response:
        found = await jobs.cancel(job_id, caller_of(request))
        return JSONResponse(job_body(found, urls_for(request)), headers=_NO_STORE)

    @routes.get(
        "/{job_id}/events",
        summary="What happens to a job, as server-sent events",
        operation_id="job_events",
        description="`queued`, `step`, `preview`, and one of `done`, `failed`, `cancelled` at the end. Each has an id "
        "to go on after by `Last-Event-ID`; 204 once the end was told.",
        response_model=None,
    )
    async def events(request: Request, job_id: str) -> Response:
        caller = caller_of(request)
        happenings = await jobs.follow(job_id, caller, request.headers.get("last-event-id"))
        if happenings is None:
            return Response(status_code=204)
        return EventResponse(_stream(happenings, urls_for(request), previews), followers, job_id, caller.share)

    return routes


async def _stream(
    happenings: AsyncGenerator[JobEvent | None], url: Callable[[str], str], previews: EncodedPreviews
) -> AsyncGenerator[str]:
    """Events as they go over the wire; a comment keeps the line open while nothing happens."""
    yield "retry: 2000\n\n"
    async with aclosing(happenings):
        async for happening in happenings:
            if happening is None:
                yield ": still there\n\n"
                continue
            body = job_body(happening.status, url)
            if happening.preview is not None:
                image = await previews.text(happening.preview, Format.WEBP)
                body |= {"content_type": Format.WEBP.content_type, "image": image}
            yield f"id: {happening.id}\nevent: {happening.kind}\ndata: {dumps(body)}\n\n"
