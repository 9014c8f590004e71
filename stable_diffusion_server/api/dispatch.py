"""Reads Prefer, X-Job-ID and Idempotency-Key, and runs a generation synchronously, as a job, or once per key."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from http import HTTPStatus

from fastapi import Request, Response
from starlette.concurrency import run_in_threadpool

from stable_diffusion_server.api.concurrency import cancel_on_disconnect
from stable_diffusion_server.api.dependencies import UrlOf, caller_of
from stable_diffusion_server.api.http_responses import JSONResponse, client_closed_request
from stable_diffusion_server.api.schemas.responses import job_body
from stable_diffusion_server.errors import Forbidden, InvalidInput, RequestCancelled, RequestInProgress, ServerError
from stable_diffusion_server.generation import GenerationService, parse_int
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

_JOB_ID = re.compile(r"[A-Za-z0-9_-]{16,64}")
_KEY = re.compile(r"[!-~]{1,255}")
_WAIT_MAX_SECONDS = 600
# Renders a result as a route's response. The last argument is the file, empty unless the route requests it.
Render = Callable[[Request, GenerationResult, bytes], Response | Awaitable[Response]]
# Generates an image: its result and its file. The last value of `OnceGenerated`: an earlier request generated it.
Generate = Callable[[], Awaitable[tuple[GenerationResult, bytes]]]
OnceGenerated = tuple[GenerationResult, bytes, bool]


@dataclass(frozen=True, slots=True)
class RequestPreferences:
    """`wait`: seconds that an asynchronous request waits for its result before the server answers with the job."""

    respond_async: bool = False
    wait: float | None = None
    job_id: str | None = None
    key: str | None = None

    @property
    def applied(self) -> str:
        """Return the value of `Preference-Applied`."""
        return "respond-async" + ("" if self.wait is None else f", wait={self.wait:g}")


def preferences_of(request: Request) -> RequestPreferences:
    """Read the preferences in the headers of a request. Ignores invalid preferences, as RFC 7240 requires.

    Raises `InvalidInput` for an invalid `X-Job-ID` or `Idempotency-Key`.
    """
    preferences: dict[str, str] = {}
    for preference in ",".join(request.headers.getlist("prefer")).split(","):
        name, _, value = preference.partition(";")[0].partition("=")
        preferences.setdefault(name.strip().lower(), value.strip().strip('"'))
    job_id, key = request.headers.get("x-job-id"), request.headers.get("idempotency-key")
    if job_id is not None and not _JOB_ID.fullmatch(job_id):
        raise InvalidInput("X-Job-ID must be 16 to 64 letters, digits, dashes or underscores.", field="X-Job-ID")
    if key is not None and not _KEY.fullmatch(key):
        raise InvalidInput("Idempotency-Key must be 1 to 255 printable characters.", field="Idempotency-Key")
    seconds = parse_int(preferences["wait"]) if "wait" in preferences else None
    wait = None if seconds is None else float(min(seconds, _WAIT_MAX_SECONDS))
    return RequestPreferences("respond-async" in preferences, wait, job_id, key)


_NO_PREFERENCES = RequestPreferences()


@dataclass(frozen=True, slots=True)
class _Call:
    """One call: the HTTP request, the generation request, and the renderer of the result."""

    request: Request
    generation: GenerationRequest
    render: Render
    with_file: bool
    preferences: RequestPreferences
    claim: IdempotencyClaim | None = None


class RequestDispatcher:
    """Answers generation requests. `url_of` makes the URL of an object key, `base_of` that of this server."""

    def __init__(
        self, service: GenerationService, jobs: JobManager, url_of: UrlOf, base_of: Callable[[Request], str]
    ) -> None:
        self._service = service
        self._jobs = jobs
        self._url_of = url_of
        self._base_of = base_of
        # Set when the response of a claimed key, by caller and key, is recorded.
        self._running: dict[tuple[str, str], asyncio.Event] = {}

    async def dispatch(
        self,
        request: Request,
        generation: GenerationRequest,
        render: Render,
        *,
        with_file: bool = False,
        joins: bool = False,
    ) -> Response:
        """Return the response that the request prefers. With `with_file`, `render` gets the encoded image.

        With `joins`, a request waits for the response of a running one with its idempotency key, instead of 409. Read
        the body before this call. Raises the errors of the service and of the jobs, and `RequestCancelled` if a client
        cancels the job by its id.
        """
        preferences, caller = preferences_of(request), caller_of(request)
        if preferences.job_id is not None and caller.anonymous:
            raise Forbidden("Without a key jobs have ids that this server makes.", field="X-Job-ID")
        if preferences == _NO_PREFERENCES and not with_file and generation.webhook_url is None:
            result = self._service.lookup_cached(generation, caller)
            if result is not None:
                return await _rendered(render, request, result, b"")
        claim = await self.claim_of(request, generation, preferences.key)
        call = _Call(request, generation, render, with_file, preferences, claim)
        if preferences.respond_async:
            return await self._answer_by_job(call)
        if generation.webhook_url is not None:
            raise InvalidInput("webhook_url is for jobs: send 'Prefer: respond-async' too.", field="webhook_url")
        recorded = None if claim is None else await self._claim_or_recorded(claim, caller, joins=joins)
        return await (self._answer_at_once(call) if recorded is None else self._answer_recorded(call, recorded))

    async def claim_of(
        self, request: Request, generation: GenerationRequest, key: str | None, form: str = ""
    ) -> IdempotencyClaim | None:
        """Return the claim of an idempotency key, `None` without one. `form` is what else the response depends on."""
        if key is None:
            return None
        caller = caller_of(request)
        digest = await run_in_threadpool(fingerprint, f"{request.url.path}{form}", generation)
        return IdempotencyClaim(caller.owner, key, digest, caller.share)

    async def generate_once(
        self, request: Request, claim: IdempotencyClaim | None, generate: Generate, *, with_file: bool
    ) -> OnceGenerated:
        """Return what `generate` returns, or what it returned to an earlier request with this claim, and which of both.

        The file is empty without `with_file`. Waits for an earlier request that is running. Raises the errors of
        `generate` and of the jobs.
        """
        if claim is None:
            return (*await generate(), False)
        recorded = await self._claim_or_recorded(claim, caller_of(request), joins=True)
        if recorded is not None:
            if isinstance(recorded.outcome, StoredProblem):
                raise recorded.outcome.as_error()
            assert recorded.outcome is not None  # noqa: S101  # only jobs have none; narrows the type
            file = await self._service.read_file(recorded.outcome) if with_file else b""
            return recorded.outcome, file, True
        outcome: GenerationResult | StoredProblem | None = None
        try:
            outcome, file = await generate()
        except Exception as error:
            outcome = _problem_of(error)
            raise
        finally:
            await self._record(claim, outcome)
        return outcome, file, False

    async def _claim_or_recorded(
        self, claim: IdempotencyClaim, caller: Caller, *, joins: bool
    ) -> RecordedResponse | None:
        """Claim an idempotency key, or return its recorded response. If that image was deleted, claim again."""
        while True:
            try:
                recorded = await self._jobs.claim(claim)
                if recorded is not None and await self._image_was_deleted(recorded, caller):
                    await self._jobs.renew(claim, recorded)
                    recorded = await self._jobs.claim(claim)
            except RequestInProgress:
                running = self._running.get((claim.caller, claim.key))
                if running is None or not joins:  # another process may run it
                    raise
                await running.wait()
                continue
            if recorded is None:
                self._running[claim.caller, claim.key] = asyncio.Event()
            return recorded

    async def _record(self, claim: IdempotencyClaim, outcome: GenerationResult | StoredProblem | None) -> None:
        """Record the response of a claimed key. Failures that a changed or later request can avoid release the key."""
        recorded = None if isinstance(outcome, StoredProblem) and not _is_permanent(outcome) else outcome

        async def record() -> None:
            await self._jobs.answer(claim, recorded)
            self._running.pop((claim.caller, claim.key)).set()

        await asyncio.shield(asyncio.create_task(record()))

    async def _answer_by_job(self, call: _Call) -> Response:
        """Return 202 with the job, or its outcome if it ends within the client's `wait` seconds."""
        caller, preferences, claim = caller_of(call.request), call.preferences, call.claim
        base_url = self._base_of(call.request)
        accepted = await self._jobs.accept(
            call.generation, caller, base_url=base_url, job_id=preferences.job_id, claim=claim
        )
        recorded = accepted if isinstance(accepted, RecordedResponse) else None
        if recorded is not None and claim is not None and await self._image_was_deleted(recorded, caller):
            await self._jobs.renew(claim, recorded)
            # The requested id may belong to the old job, whose image was deleted; then use a new id.
            job_id = preferences.job_id if recorded.job_id is None else None
            accepted = await self._jobs.accept(call.generation, caller, base_url=base_url, job_id=job_id, claim=claim)
        if isinstance(accepted, RecordedResponse):
            return await self._answer_recorded(call, accepted)
        headers = {"Preference-Applied": preferences.applied, "X-Job-ID": accepted.id}
        if preferences.wait is not None:
            job = await self._jobs.wait_for(accepted.id, caller, preferences.wait)
            if job.outcome is not None:
                response = await self._answer_outcome(call, job.outcome)
                response.headers.update(headers)
                return response
        return self._accepted(call.request, accepted, headers)

    async def _answer_at_once(self, call: _Call) -> Response:
        """Generate, and return the result. A client that disconnects cancels the work."""
        outcome: GenerationResult | StoredProblem | None = None
        state = JobState.CANCELLED
        try:
            job = await self._jobs.track_request(caller_of(call.request), call.preferences.job_id)
        except BaseException:
            if call.claim is not None:
                await self._record(call.claim, None)
            raise
        try:
            generated = await cancel_on_disconnect(call.request, self._generate(job, call))
            if generated is None:
                return client_closed_request()
            state, outcome = JobState.DONE, generated[0]
            response = await _rendered(call.render, call.request, *generated)
            response.headers["X-Job-ID"] = job.status.id
            return response
        except RequestCancelled:
            raise
        except Exception as error:
            state, outcome = JobState.FAILED, _problem_of(error)
            raise
        finally:
            self._jobs.finish_request(job, state, outcome)
            if call.claim is not None:
                await self._record(call.claim, outcome)

    async def _generate(self, job: JobHandle, call: _Call) -> tuple[GenerationResult, bytes]:
        job.task = asyncio.current_task()
        caller, watch, previews = job.record.caller, job.report_progress, job.wants_previews
        try:
            if call.with_file:
                return await self._service.generate_with_bytes(
                    call.generation, caller=caller, watch=watch, previews=previews
                )
            return await self._service.generate(call.generation, caller=caller, watch=watch, previews=previews), b""
        except asyncio.CancelledError:
            if job.cancelled:
                raise RequestCancelled("This job was cancelled by its id.") from None
            raise

    async def _image_was_deleted(self, recorded: RecordedResponse, caller: Caller) -> bool:
        """Return whether the image of a recorded response was deleted, so that it must be generated again."""
        outcome = recorded.outcome
        if recorded.job_id is not None:
            outcome = (await self._jobs.status(recorded.job_id, caller)).outcome
        return isinstance(outcome, GenerationResult) and await self._service.is_gone(outcome)

    async def _answer_recorded(self, call: _Call, recorded: RecordedResponse) -> Response:
        """Return the recorded response of the idempotency key."""
        if recorded.job_id is not None:
            job = await self._jobs.status(recorded.job_id, caller_of(call.request))
            response = self._accepted(call.request, job, {"X-Job-ID": job.id})
        else:
            assert recorded.outcome is not None  # noqa: S101  # there is a job id or an outcome; narrows the type
            response = await self._answer_outcome(call, recorded.outcome)
        response.headers["Idempotency-Replayed"] = "true"
        return response

    async def _answer_outcome(self, call: _Call, outcome: GenerationResult | StoredProblem) -> Response:
        if isinstance(outcome, StoredProblem):
            raise outcome.as_error()
        file = await self._service.read_file(outcome) if call.with_file else b""
        return await _rendered(call.render, call.request, outcome, file)

    def _accepted(self, request: Request, job: JobStatus, headers: dict[str, str]) -> Response:
        body = job_body(job, lambda key: self._url_of(request, key))
        return JSONResponse(body, 202, {"Location": f"/jobs/{job.id}", **headers})


async def _rendered(render: Render, request: Request, result: GenerationResult, file: bytes) -> Response:
    response = render(request, result, file)
    return response if isinstance(response, Response) else await response


def _problem_of(error: Exception) -> StoredProblem:
    known = error if isinstance(error, ServerError) else ServerError("An unexpected error happened.")
    return StoredProblem.from_error(known)


def _is_permanent(problem: StoredProblem) -> bool:
    """Return whether the same request fails again, and no corrected one can take its idempotency key."""
    error = problem.as_error()
    permanent = not error.retryable and type(error) is not ServerError
    return permanent and error.status >= HTTPStatus.INTERNAL_SERVER_ERROR
