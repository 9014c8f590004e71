"""Routes of jobs: list, status, cancel, and their events."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from fastapi import APIRouter, Request, Response
from fastapi.sse import format_sse_event

from stable_diffusion_server.api.base64_images import EncodedPreviews
from stable_diffusion_server.api.dependencies import UrlOf, caller_of
from stable_diffusion_server.api.http_responses import EventResponse, FollowerLimiter, JSONResponse, json_event
from stable_diffusion_server.api.openapi.document import EVENT_STREAM
from stable_diffusion_server.api.schemas.responses import JobListBody, JobStatusBody, described, job_body
from stable_diffusion_server.jobs import JobEvent, JobManager
from stable_diffusion_server.types import Format

_NO_STORE = {"Cache-Control": "no-store"}
_RECONNECT_MILLISECONDS = 2000


def jobs_router(jobs: JobManager, url_of: UrlOf, followers: FollowerLimiter, previews: EncodedPreviews) -> APIRouter:
    """Return the routes of jobs; `followers` limits who follows events, `previews` encodes for all followers."""
    routes = APIRouter(prefix="/jobs", tags=["jobs"])

    def urls_for(request: Request) -> Callable[[str], str]:
        return lambda key: url_of(request, key)

    @routes.get(
        "",
        summary="Your latest accepted jobs, newest first",
        operation_id="list_jobs",
        response_model=None,
        responses={200: {"model": described(JobListBody)}},
    )
    async def list_jobs(request: Request) -> Response:
        bodies = [job_body(job, urls_for(request)) for job in await jobs.list_jobs(caller_of(request))]
        return JSONResponse({"jobs": bodies}, headers=_NO_STORE)

    @routes.get(
        "/{job_id}",
        summary="Status of a job",
        operation_id="get_job",
        response_model=None,
        responses={200: {"model": described(JobStatusBody)}},
    )
    async def get_job(request: Request, job_id: str) -> Response:
        job = await jobs.status(job_id, caller_of(request))
        return JSONResponse(job_body(job, urls_for(request)), headers=_NO_STORE)

    @routes.delete(
        "/{job_id}",
        summary="Cancel a job; one that has ended does not change",
        operation_id="cancel_job",
        response_model=None,
        responses={200: {"model": described(JobStatusBody)}},
    )
    async def cancel_job(request: Request, job_id: str) -> Response:
        job = await jobs.cancel(job_id, caller_of(request))
        return JSONResponse(job_body(job, urls_for(request)), headers=_NO_STORE)

    @routes.get(
        "/{job_id}/events",
        summary="Events of a job, as server-sent events",
        operation_id="job_events",
        description="`queued`, `loading`, `step`, `preview`, and finally one of `done`, `failed` and `cancelled`. "
        "Send the id of the last event as `Last-Event-ID` to continue after it; 204 if that was the final one.",
        response_model=None,
        response_class=Response,
        responses={200: {"content": EVENT_STREAM}, 204: {"description": "No further events"}},
    )
    async def job_events(request: Request, job_id: str) -> Response:
        caller = caller_of(request)
        events = await jobs.follow(job_id, caller, request.headers.get("last-event-id"))
        if events is None:
            return Response(status_code=204)
        return EventResponse(_stream(events, urls_for(request), previews), followers, job_id, caller.share)

    return routes


async def _stream(
    events: AsyncGenerator[JobEvent | None], url: Callable[[str], str], previews: EncodedPreviews
) -> AsyncGenerator[bytes]:
    """Yield encoded events, and comments that keep an idle connection alive."""
    yield format_sse_event(retry=_RECONNECT_MILLISECONDS)
    async with aclosing(events):
        async for event in events:
            if event is None:
                yield format_sse_event(comment="still there")
                continue
            body = job_body(event.status, url)
            if event.preview is not None:
                image = await previews.text(event.preview, Format.WEBP)
                body |= {"content_type": Format.WEBP.content_type, "image": image}
            yield json_event(body, event.kind, event.id)
