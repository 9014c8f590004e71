"""A picture from a job by way of the queue: prompts that fit, one effort for equal jobs, news for who waits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

from stable_diffusion_server import engine
from stable_diffusion_server.generation.prompts import shorten_too_long_text
from stable_diffusion_server.generation.quality import CheckedImage, DecodedPixels, RetryPolicy, generate_with_retries
from stable_diffusion_server.generation.resolver import GenerationOptions
from stable_diffusion_server.generation.single_flight import ProgressBroadcaster, ProgressListener, SingleFlight
from stable_diffusion_server.pipelines import spec_of
from stable_diffusion_server.types import (
    Caller,
    DiffusionRequest,
    EngineEvent,
    EngineEventKind,
    GenerationProgress,
    image_digest,
)


class EngineQueue(Protocol):
    """Where jobs are handed in. Both raise `NotReady` and `QueueFull`."""

    def check_open(self, owner: str = "", *, background: bool = False) -> None:
        """Raise now what `submit` would raise."""

    def submit(
        self,
        job: DiffusionRequest,
        *,
        owner: str,
        background: bool,
        previews: bool,
        watch: Callable[[EngineEvent], None],
        label: str,
        exclusive: bool,
    ) -> engine.Ticket[DecodedPixels]:
        """Accept a job. `watch` is told of its events, on the queue's own thread."""


@dataclass(frozen=True, slots=True)
class SubmissionContext:
    """For whom an effort is begun, and in what haste; those who join later do not change that.

    `job_id` is the accepted job's, if it is one; a `suspect` may have ended the process, and has the device for itself.
    """

    caller: Caller
    background: bool
    job_id: str = ""
    suspect: bool = False


class GenerationExecutor:
    """Draws each job once for all who want it at the same time."""

    def __init__(self, queue: EngineQueue, count_tokens: Callable[[str, str], int], options: GenerationOptions) -> None:
        self._queue = queue
        self._count_tokens = count_tokens
        self._options = options
        self._flights: SingleFlight[CheckedImage[DecodedPixels]] = SingleFlight()

    def fit_prompts(self, job: DiffusionRequest) -> DiffusionRequest:
        """The job with its prompts as long as its model reads them. Slow where they are long."""
        negative = self._fit(job.model, job.negative_prompt) if job.negative_prompt else job.negative_prompt
        return replace(job, prompt=self._fit(job.model, job.prompt), negative_prompt=negative)

    async def generate(
        self, job: DiffusionRequest, whom: SubmissionContext, listener: ProgressListener
    ) -> tuple[CheckedImage[DecodedPixels], bool]:
        """The picture, and whether the effort was another's. Raises what the queue and `draw_well` raise."""
        return await self._flights.join(
            image_digest(job), "", lambda audience: self._draw(job, whom, audience), listener
        )

    async def _draw(
        self, job: DiffusionRequest, whom: SubmissionContext, audience: ProgressBroadcaster
    ) -> CheckedImage[DecodedPixels]:
        loop = asyncio.get_running_loop()

        async def once(job: DiffusionRequest) -> engine.EngineResult[DecodedPixels]:
            def tell(event: EngineEvent) -> None:
                ticket.wants_previews = audience.wants_previews  # who joined late may want them
                audience.on_progress(_progress_of(event))

            ticket = self._queue.submit(
                job,
                owner=whom.caller.share,
                background=whom.background,
                previews=audience.wants_previews,
                watch=lambda event: _tell_soon(loop, tell, event),
                label=whom.job_id,
                exclusive=whom.suspect,
            )
            return await asyncio.wrap_future(ticket.result)

        options, facts = self._options, spec_of(job.model, self._options.models)
        redraws = facts.bumpy_redraws if options.bumpy_redraws is None else options.bumpy_redraws
        remedy = RetryPolicy(redraws, options.limits.max_steps, facts, lambda text: self._fit(job.model, text))
        return await generate_with_retries(job, once, remedy)

    def _fit(self, model: str, text: str) -> str:
        facts = spec_of(model, self._options.models)
        return shorten_too_long_text(text, facts.text_tokens, lambda t: self._count_tokens(model, t))


def _tell_soon(loop: asyncio.AbstractEventLoop, tell: Callable[[EngineEvent], None], event: EngineEvent) -> None:
    """Carry the news of a job under way from the queue's thread to the event loop; its end is told by its result."""
    if event.kind in (EngineEventKind.QUEUED, EngineEventKind.STARTED, EngineEventKind.STEP) and not loop.is_closed():
        loop.call_soon_threadsafe(tell, event)


def _progress_of(event: EngineEvent) -> GenerationProgress:
    return GenerationProgress(event.kind, event.step, event.steps, event.position, event.eta_seconds, event.preview)
