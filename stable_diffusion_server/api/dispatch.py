"""How every generating door answers an order: at once or by a job, once for its key, or not, to who left."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from fastapi import Request, Response

from stable_diffusion_server.api.concurrency import cancel_on_disconnect
from stable_diffusion_server.api.dependencies import caller_of
from stable_diffusion_server.api.json_responses import JSONResponse
from stable_diffusion_server.api.preferences import RequestPreferences, preferences_of
from stable_diffusion_server.api.problems import client_gone
from stable_diffusion_server.api.schemas.wire import job_body
from stable_diffusion_server.errors import Forbidden, InvalidInput, RequestCancelled, ServerError
from stable_diffusion_server.generation import GenerationService
from stable_diffusion_server.jobs import (
    IdempotencyClaim,
    JobHandle,
    JobManager,
    JobState,
    JobStatus,
    RecordedResponse,
    StoredProblem,
    fingerprint,
)
from stable_diffusion_server.types import Caller, GenerationRequest, GenerationResult

UrlOf = Callable[[Request, str], str]
# A door's own way to tell a receipt; the picture's file is empty unless the door asked for it.
Render = Callable[[Request, GenerationResult, bytes], Response | Awaitable[Response]]
_NONE = RequestPreferences()


class RequestDispatcher:
    """Answers orders. `url_of` makes the URL of a key for the client at hand, `base_of` that of this server."""

    def __init__(
        self, service: GenerationService, jobs: JobManager, url_of: UrlOf, base_of: Callable[[Request], str]
    ) -> None:
        self._service = service
        self._jobs = jobs
        self._url_of = url_of
        self._base_of = base_of

    async def dispatch(
        self, request: Request, order: GenerationRequest, render: Render, *, picture: bool = False
    ) -> Response:
        """The answer to an order as the request prefers it. With `picture`, `render` is given the file.

        The body must have been read. Raises what the service and the jobs raise, and `RequestCancelled` when someone
        cancels the job by its id.
        """
        wanted, caller = preferences_of(request), caller_of(request)
        if wanted.job_id is not None and caller.anonymous:
            raise Forbidden("Without a key jobs have ids that this server makes.", field="X-Job-ID")
        if wanted == _NONE and not picture and order.webhook_url is None:
            receipt = self._service.lookup_cached(order, caller)
            if receipt is not None:
                return await _rendered(render, request, receipt, b"")
        claim = None
        if wanted.key is not None:
            print_ = await asyncio.to_thread(fingerprint, request.url.path, order)
            claim = IdempotencyClaim(caller.owner, wanted.key, print_, caller.share)
        if wanted.respond_async:
            return await self._by_job(request, order, render, wanted, claim, picture=picture)
        if order.webhook_url is not None:
            raise InvalidInput("webhook_url is told of jobs: send 'Prefer: respond-async' too.", field="webhook_url")
        if claim is None:
            return await self._at_once(request, order, render, wanted, None, picture=picture)
        before = await self._jobs.claim(claim)
        if before is not None and await self._is_gone(before, caller):
            await self._jobs.renew(claim, before)
            before = await self._jobs.claim(claim)
        if before is not None:
            return await self._again(request, before, render, picture=picture)
        return await self._at_once(request, order, render, wanted, claim, picture=picture)

    async def _by_job(
        self,
        request: Request,
        order: GenerationRequest,
        render: Render,
        wanted: RequestPreferences,
        claim: IdempotencyClaim | None,
        *,
        picture: bool,
    ) -> Response:
        """202 with the job, or its outcome when that is there in the time the client would rather wait."""
        caller, base = caller_of(request), self._base_of(request)
        accepted = await self._jobs.accept(order, caller, base_url=base, job_id=wanted.job_id, claim=claim)
        if isinstance(accepted, RecordedResponse) and claim is not None and await self._is_gone(accepted, caller):
            await self._jobs.renew(claim, accepted)
            # The id it asked for may be that of the job whose picture is gone.
            job_id = wanted.job_id if accepted.job_id is None else None
            accepted = await self._jobs.accept(order, caller, base_url=base, job_id=job_id, claim=claim)
        if isinstance(accepted, RecordedResponse):
            return await self._again(request, accepted, render, picture=picture)
        applied = {"Preference-Applied": wanted.applied, "X-Job-ID": accepted.id}
        if wanted.wait is not None:
            standing = await self._jobs.wait_for(accepted.id, caller, wanted.wait)
            if standing.outcome is not None:
                answer = await self._told(request, standing.outcome, render, picture=picture)
                answer.headers.update(applied)
                return answer
        return self._accepted(request, accepted, applied)

    async def _at_once(
        self,
        request: Request,
        order: GenerationRequest,
        render: Render,
        wanted: RequestPreferences,
        claim: IdempotencyClaim | None,
        *,
        picture: bool,
    ) -> Response:
        """The picture, or nothing for a client that went away first, which cancels the work."""
        outcome: GenerationResult | StoredProblem | None = None
        state = JobState.CANCELLED
        try:
            live = await self._jobs.track_request(caller_of(request), wanted.job_id)
        except BaseException:
            if claim is not None:
                await asyncio.shield(asyncio.ensure_future(self._jobs.answer(claim, None)))
            raise
        try:
            drawn = await cancel_on_disconnect(request, self._drawn(live, order, picture=picture))
            if drawn is None:
                return client_gone()
            state, outcome = JobState.DONE, drawn[0]
            answer = await _rendered(render, request, *drawn)
            answer.headers["X-Job-ID"] = live.status.id
            return answer
        except RequestCancelled:
            raise
        except Exception as error:
            known = error if isinstance(error, ServerError) else ServerError("An unexpected error happened.")
            state, outcome = JobState.FAILED, StoredProblem.from_error(known)
            raise
        finally:
            self._jobs.finish_request(live, state, outcome)
            if claim is not None:
                kept = outcome if state is JobState.DONE or _will_not_change(outcome) else None
                await asyncio.shield(asyncio.ensure_future(self._jobs.answer(claim, kept)))

    async def _drawn(
        self, live: JobHandle, order: GenerationRequest, *, picture: bool
    ) -> tuple[GenerationResult, bytes]:
        live.task = asyncio.current_task()
        caller, watch, previews = live.record.caller, live.report_progress, live.wants_previews
        try:
            if picture:
                return await self._service.generate_with_bytes(order, caller=caller, watch=watch, previews=previews)
            return await self._service.generate(order, caller=caller, watch=watch, previews=previews), b""
        except asyncio.CancelledError:
            if live.cancelled:
                raise RequestCancelled("This job was cancelled by its id.") from None
            raise

    async def _is_gone(self, before: RecordedResponse, caller: Caller) -> bool:
        """Whether a key was answered with a picture that is not there any more, so that it has to be drawn again."""
        outcome = before.outcome
        if before.job_id is not None:
            outcome = (await self._jobs.status(before.job_id, caller)).outcome
        return isinstance(outcome, GenerationResult) and await self._service.is_gone(outcome)

    async def _again(self, request: Request, before: RecordedResponse, render: Render, *, picture: bool) -> Response:
        """What a key was answered with before."""
        if before.job_id is not None:
            standing = await self._jobs.status(before.job_id, caller_of(request))
            answer = self._accepted(request, standing, {"X-Job-ID": standing.id})
        else:
            assert before.outcome is not None  # noqa: S101  # one of both is there; tells the type checker
            answer = await self._told(request, before.outcome, render, picture=picture)
        answer.headers["Idempotency-Replayed"] = "true"
        return answer

    async def _told(
        self, request: Request, outcome: GenerationResult | StoredProblem, render: Render, *, picture: bool
    ) -> Response:
        if isinstance(outcome, StoredProblem):
            raise outcome.as_error()
        file = await self._service.read_file(outcome) if picture else b""
        return await _rendered(render, request, outcome, file)

    def _accepted(self, request: Request, standing: JobStatus, headers: dict[str, str]) -> Response:
        body = job_body(standing, lambda key: self._url_of(request, key))
        return JSONResponse(body, 202, {"Location": f"/jobs/{standing.id}", **headers})


async def _rendered(render: Render, request: Request, receipt: GenerationResult, file: bytes) -> Response:
    answer = render(request, receipt, file)
    return answer if isinstance(answer, Response) else await answer


def _will_not_change(outcome: GenerationResult | StoredProblem | None) -> bool:
    """Whether a request that failed would fail again, so that its key may be answered with that."""
    if not isinstance(outcome, StoredProblem):
        return False
    error = outcome.as_error()
    return not error.retryable and type(error) is not ServerError
