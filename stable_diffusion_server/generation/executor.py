"""Runs a request on the engine: shortens its prompts, coalesces equal requests, reports progress to the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from functools import partial

from stable_diffusion_server.engine import EngineResult
from stable_diffusion_server.generation.interfaces import EngineQueue
from stable_diffusion_server.generation.prompt_fitting import shorten_weighted_text
from stable_diffusion_server.generation.prompts import fits_in, shorten_too_long_text
from stable_diffusion_server.generation.quality import CheckedImage, DecodedPixels, RetryPolicy, generate_with_retries
from stable_diffusion_server.generation.resolver import GenerationOptions, ResolvedRequest
from stable_diffusion_server.generation.single_flight import ProgressBroadcaster, ProgressListener, SingleFlight
from stable_diffusion_server.pipelines import spec_of
from stable_diffusion_server.types import (
    Caller,
    DiffusionRequest,
    EngineEvent,
    EngineEventKind,
    GenerationProgress,
    PromptSyntax,
    StoredObject,
    image_digest,
)

_PROGRESS = (EngineEventKind.QUEUED, EngineEventKind.LOADING, EngineEventKind.STARTED, EngineEventKind.STEP)


@dataclass(frozen=True, slots=True)
class SubmissionContext:
    """The caller of a request, and scheduling options. Callers that join a running task later do not change it.

    `job_id` is set for an asynchronous job. A `suspect` may have crashed the process before, so it runs alone.
    """

    caller: Caller
    background: bool
    job_id: str = ""
    suspect: bool = False


class GenerationExecutor:
    """Submits requests to the engine; concurrent equal requests run once."""

    def __init__(self, queue: EngineQueue, count_tokens: Callable[[str, str], int], options: GenerationOptions) -> None:
        self._queue = queue
        self._count_tokens = count_tokens
        self._options = options
        self._running: SingleFlight[CheckedImage[DecodedPixels]] = SingleFlight()

    @property
    def max_side(self) -> int:
        """The longest side of an image, in pixels."""
        return self._options.limits.max_side

    def fit_prompts(self, request: DiffusionRequest, resolved: ResolvedRequest) -> DiffusionRequest:
        """Return the request with prompts shortened to the token limit of its model. Blocks: tokenizing takes time.

        In AUTOMATIC1111's syntax, prompts of more than one chunk of tokens are read in chunks.
        """
        negative, second = request.negative_prompt, request.prompt_2
        if resolved.parameters.prompt_syntax is PromptSyntax.A1111 and not request.weighted:
            limit, count = self._limit(request), partial(self._count_tokens, request.model)
            long = any(not fits_in(text, limit, count) for text in (request.prompt, negative or "", second or ""))
            request = replace(request, weighted=long)
        prompt = self._fit(request, request.prompt)
        negative, second = (text and self._fit(request, text) for text in (negative, second))
        return replace(request, prompt=prompt, negative_prompt=negative, prompt_2=second)

    async def load_unread(
        self,
        resolved: ResolvedRequest,
        find: Callable[[ResolvedRequest], Awaitable[StoredObject | None]],
        context: SubmissionContext,
        listener: ProgressListener,
    ) -> bool:
        """Have a model loaded that was not loaded yet, and wait until it is; returns whether that was so.

        It is not loaded for an image that `find` finds stored under a remembered revision. Raises the errors of `find`,
        of `EngineQueue.load_model` and of the load.
        """
        spec = resolved.parameters.spec
        known = spec.remembered and all(source.url is None for source in resolved.request.sources)
        if not spec.unread or (known and await find(resolved) is not None):
            return False
        loop = asyncio.get_running_loop()

        def watch(event: EngineEvent) -> None:
            if event.kind in _PROGRESS and not loop.is_closed():
                loop.call_soon_threadsafe(listener.on_progress, _progress_of(event))

        ticket = self._queue.load_model(
            spec.name,
            owner=context.caller.share,
            background=context.background,
            watch=watch,
            label=context.job_id,
            exclusive=context.suspect,
        )
        await asyncio.wrap_future(ticket.result)
        return True

    async def generate(
        self, request: DiffusionRequest, context: SubmissionContext, listener: ProgressListener
    ) -> tuple[CheckedImage[DecodedPixels], bool]:
        """Return the checked image, and whether an equal request was already running.

        Raises the errors of `EngineQueue.submit` and of `generate_with_retries`.
        """
        return await self._running.join(
            image_digest(request), "", lambda broadcaster: self._generate(request, context, broadcaster), listener
        )

    async def _generate(
        self, request: DiffusionRequest, context: SubmissionContext, broadcaster: ProgressBroadcaster
    ) -> CheckedImage[DecodedPixels]:
        async def run_once(attempt: DiffusionRequest) -> EngineResult[DecodedPixels]:
            return await self._run_on_engine(attempt, context, broadcaster)

        options, spec = self._options, spec_of(request.model, self._options.models)
        retries = spec.bumpy_redraws if options.bumpy_redraws is None else options.bumpy_redraws
        policy = RetryPolicy(retries, options.limits.max_steps, spec, partial(self._fit, request))
        return await generate_with_retries(request, run_once, policy)

    async def _run_on_engine(
        self, request: DiffusionRequest, context: SubmissionContext, broadcaster: ProgressBroadcaster
    ) -> EngineResult[DecodedPixels]:
        loop = asyncio.get_running_loop()

        def report(event: EngineEvent) -> None:
            ticket.wants_previews = broadcaster.wants_previews  # a caller that joined later may want them
            broadcaster.on_progress(_progress_of(event))

        def watch(event: EngineEvent) -> None:
            # Runs on an engine thread. Only progress is reported here: the ticket's result reports the end.
            if event.kind in _PROGRESS and not loop.is_closed():
                loop.call_soon_threadsafe(report, event)

        ticket = self._queue.submit(
            request,
            owner=context.caller.share,
            background=context.background,
            previews=broadcaster.wants_previews,
            watch=watch,
            wants_picture=lambda: broadcaster.wants_picture,
            label=context.job_id,
            exclusive=context.suspect,
        )
        return await asyncio.wrap_future(ticket.result)

    def _fit(self, request: DiffusionRequest, text: str) -> str:
        count, stop_words = partial(self._count_tokens, request.model), self._options.stop_words
        if request.weighted:
            return shorten_weighted_text(text, request.num_inference_steps, count, stop_words)
        return shorten_too_long_text(text, self._limit(request), count, stop_words)

    def _limit(self, request: DiffusionRequest) -> int:
        return spec_of(request.model, self._options.models).text_tokens


def _progress_of(event: EngineEvent) -> GenerationProgress:
    """Return the progress of an event. Its picture has the size of the canvas; `PassListener` composes the output."""
    picture = None if event.picture is None else (lambda: event.picture.pixels)
    return GenerationProgress(
        event.kind, event.step, event.steps, event.position, event.eta_seconds, event.preview, picture, event.loaded
    )
