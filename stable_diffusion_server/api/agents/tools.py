"""Runs the tools of agents over our own routes: drawing as jobs with progress, and what looks at models and jobs."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, unquote, urlencode

from fastapi import Request
from starlette.concurrency import run_in_threadpool

from stable_diffusion_server.api.agents.drawing_tool import DrawingTool
from stable_diffusion_server.api.agents.inner_requests import InnerAnswer, InnerClient
from stable_diffusion_server.api.agents.tool_schemas import DRAWING_TOOLS, LOOKING_TOOLS
from stable_diffusion_server.api.base64_images import text_of
from stable_diffusion_server.api.dependencies import DialectContext, UrlOf, caller_of
from stable_diffusion_server.api.http_responses import FollowerLimiter
from stable_diffusion_server.api.schemas.responses import job_body, problem_body
from stable_diffusion_server.errors import InvalidInput, ServerError
from stable_diffusion_server.generation import DecodeImage, GenerationService
from stable_diffusion_server.imaging import encode_image, media_type_of, shrink_to_area
from stable_diffusion_server.jobs import JobManager, JobStatus
from stable_diffusion_server.types import Caller, Format, GenerationResult

# Pixels and quality of the picture in an answer: it costs an agent's context.
_THUMBNAIL_AREA, _THUMBNAIL_QUALITY = 512 * 512, 70
_MAX_TEXT = 100_000
_BY_JOB = {b"prefer": b"respond-async"}
# Reports progress: steps done, steps in all or `None`, and a sentence.
Report = Callable[[float, float | None, str], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class ToolAnswer:
    """What a tool answers: a JSON object, a WebP picture of at most 512 × 512 pixels or none, and whether it failed."""

    body: Mapping[str, Any]
    picture: bytes = b""
    failed: bool = False

    @property
    def text(self) -> str:
        """The body as JSON text."""
        return json.dumps(self.body, ensure_ascii=False)[:_MAX_TEXT]


@dataclass(frozen=True, slots=True)
class AgentTools:
    """The tools. `base_of` returns the URL of this server; `stopping` whether the server is about to stop."""

    service: GenerationService
    jobs: JobManager
    context: DialectContext
    url_of: UrlOf
    base_of: Callable[[Request], str]
    followers: FollowerLimiter
    decode: DecodeImage
    max_image_bytes: int

    async def call(
        self, name: str, arguments: Mapping[str, Any], request: Request, report: Report, stopping: Callable[[], bool]
    ) -> ToolAnswer:
        """Run a tool for the caller of a request. A cancelled call cancels its job, unless the server stops.

        Errors of the service are failed answers, as the protocol wants them. Raises `KeyError` for an unknown tool.
        """
        try:
            if name in DRAWING_TOOLS:
                return await self._draw(DRAWING_TOOLS[name], arguments, request, report, stopping)
            _check_names(arguments, LOOKING_TOOLS[name][1])
            match name:
                case "list_models":
                    return self._models(caller_of(request))
                case "history":
                    return await _history(arguments, InnerClient(request))
                case _:
                    return await self._job(name, arguments, request)
        except ServerError as error:
            return ToolAnswer(dict(problem_body(error)), failed=True)

    async def _draw(
        self,
        tool: DrawingTool,
        arguments: Mapping[str, Any],
        request: Request,
        report: Report,
        stopping: Callable[[], bool],
    ) -> ToolAnswer:
        _check_names(arguments, tool.input_schema(self.context.limits))
        inner = InnerClient(request)
        sent = {name: value for name, value in arguments.items() if name in tool.names}
        for name, parameter in tool.images.items():
            if name in arguments:
                sent[parameter] = await self._images(name, arguments[name], inner, request)
        accepted = await inner.call("POST", tool.path, json_body=sent, headers=_BY_JOB)
        if accepted.status != 202:
            return _failed(accepted)
        job_id = str(accepted.json()["id"])
        if arguments.get("wait", True) is False:
            return ToolAnswer(accepted.json())
        caller = caller_of(request)
        try:
            await self._follow(job_id, caller, report)
        except asyncio.CancelledError:
            if not stopping():
                await asyncio.shield(asyncio.create_task(self.jobs.cancel(job_id, caller)))
            raise
        return await self._answer_of(await self.jobs.status(job_id, caller), request)

    async def _follow(self, job_id: str, caller: Caller, report: Report) -> None:
        """Report the steps of a job until it ends."""
        events = await self.jobs.follow(job_id, caller, None)
        if events is None:
            return
        done = -1.0
        with self.followers.follow(job_id, caller.share):
            async with aclosing(events):
                async for event in events:
                    if event is None or event.status.state.ended:
                        continue
                    status = event.status
                    if status.step <= done:  # the protocol wants each report to be above the one before
                        continue
                    done = status.step
                    await report(done, status.steps or None, f"step {status.step} of {status.steps}")

    async def _answer_of(self, job: JobStatus, request: Request) -> ToolAnswer:
        """Return a job, with a picture of its image if it has one."""
        body = job_body(job, lambda key: self.url_of(request, key))
        if not isinstance(job.outcome, GenerationResult):
            return ToolAnswer(body, failed=job.outcome is not None)
        with suppress(ServerError):  # a picture that was deleted, or a bucket that is down: the rest is still true
            file = await self.service.read_file(job.outcome)
            pixels = await self.decode(file, "image", share=caller_of(request).share)
            return ToolAnswer(body, await run_in_threadpool(_thumbnail, pixels))
        return ToolAnswer(body)

    async def _job(self, name: str, arguments: Mapping[str, Any], request: Request) -> ToolAnswer:
        job_id, caller = str(arguments.get("job_id", "")), caller_of(request)
        method = "GET" if name == "job_status" else "DELETE"
        answer = await InnerClient(request).call(method, f"/jobs/{quote(job_id, safe='')}")
        if answer.status != 200:
            return _failed(answer)
        return await self._answer_of(await self.jobs.status(job_id, caller), request)

    def _models(self, caller: Caller) -> ToolAnswer:
        context = self.context.for_caller(caller)
        models = [
            {
                "name": name,
                "family": spec.family,
                "tasks": [str(task) for task in spec.tasks],
                "default_steps": spec.default_steps,
                "default_guidance": spec.default_guidance,
                "best_pixels": spec.native_pixels,
                "schedulers": list(spec.schedulers),
                "is_default": name == context.default_model,
            }
            for name, spec in context.models.items()
        ]
        return ToolAnswer(
            {"models": models, "loras": sorted(context.loras()), "upscalers": list(context.upscaler.factors())}
        )

    async def _images(self, name: str, value: Any, inner: InnerClient, request: Request) -> Any:
        """Return images as a route takes them. One of this server is read here: its address may be a private one."""
        if isinstance(value, list):
            return [await self._images(name, one, inner, request) for one in value]
        own = f"{self.base_of(request)}/files/"
        if not isinstance(value, str) or not value.startswith(own):
            return value
        path, _, query = value.removeprefix(own).partition("?")
        answer = await inner.call(
            "GET", f"/files/{unquote(path)}", query=query.encode(), max_bytes=self.max_image_bytes
        )
        if answer.status != 200:
            raise InvalidInput(f"{name}: there is no such image here.", field=name)
        encoded = await run_in_threadpool(text_of, answer.body)
        return f"data:{media_type_of(answer.body)};base64,{encoded}"


async def _history(arguments: Mapping[str, Any], inner: InnerClient) -> ToolAnswer:
    given = {"q": arguments.get("query"), "limit": arguments.get("limit", 10), "before": arguments.get("before")}
    query = urlencode({name: value for name, value in given.items() if value is not None})
    answer = await inner.call("GET", "/history", query=query.encode())
    return ToolAnswer(answer.json()) if answer.status == 200 else _failed(answer)


def _failed(answer: InnerAnswer) -> ToolAnswer:
    return ToolAnswer(answer.json(), failed=True)


def _check_names(arguments: Mapping[str, Any], schema: Mapping[str, Any]) -> None:
    """Raise `InvalidInput` that names unknown and missing parameters; the routes check their values."""
    known = schema["properties"]
    faults = [(name[:100], f"{name[:100]} is not a parameter here.") for name in arguments if name not in known]
    faults += [(name, f"{name} is missing.") for name in schema["required"] if arguments.get(name) is None]
    for name in ("job_id", "query"):
        if name in known and not isinstance(arguments.get(name, ""), str):
            faults.append((name, f"{name} must be a text."))
    if not isinstance(arguments.get("wait", True), bool):
        faults.append(("wait", "wait must be true or false."))
    if faults:
        raise InvalidInput.from_faults(faults)


def _thumbnail(pixels: Any) -> bytes:
    return encode_image(shrink_to_area(pixels, _THUMBNAIL_AREA), Format.WEBP, _THUMBNAIL_QUALITY, None)
