"""A picture from a job by way of the queue: prompts that fit, one effort for equal jobs, news for who waits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

from stable_diffusion_server import engine
from stable_diffusion_server.generation.prompts import shorten_too_long_text
from stable_diffusion_server.generation.quality import DrawnPicture, Judged, Remedy, draw_well
from stable_diffusion_server.generation.resolver import Options
from stable_diffusion_server.generation.single_flight import Audience, Flights, Listener
from stable_diffusion_server.pipelines.catalog import facts_of
from stable_diffusion_server.types import Caller, Event, EventKind, Job, Progress, picture_digest


class Queue(Protocol):
    """Where jobs are handed in. Both raise `NotReady` and `Busy`."""

    def check_open(self, owner: str = "", *, background: bool = False) -> None:
        """Raise now what `submit` would raise."""

    def submit(
        self,
        job: Job,
        *,
        owner: str,
        background: bool,
        previews: bool,
        watch: Callable[[Event], None],
        label: str,
        exclusive: bool,
    ) -> engine.Ticket[DrawnPicture]:
        """Accept a job. `watch` is told of its events, on the queue's own thread."""


@dataclass(frozen=True, slots=True)
class For:
    """For whom an effort is begun, and in what haste; those who join later do not change that.

    `job_id` is the accepted job's, if it is one; a `suspect` may have ended the process, and has the device for itself.
    """

    caller: Caller
    background: bool
    job_id: str = ""
    suspect: bool = False


class Drawing:
    """Draws each job once for all who want it at the same time."""

    def __init__(self, queue: Queue, count_tokens: Callable[[str, str], int], options: Options) -> None:
        self._queue = queue
        self._count_tokens = count_tokens
        self._options = options
        self._flights: Flights[Judged[DrawnPicture]] = Flights()

    def fitted(self, job: Job) -> Job:
        """The job with its prompts as long as its model reads them. Slow where they are long."""
        negative = self._fit(job.model, job.negative_prompt) if job.negative_prompt else job.negative_prompt
        return replace(job, prompt=self._fit(job.model, job.prompt), negative_prompt=negative)

    async def draw(self, job: Job, whom: For, listener: Listener) -> tuple[Judged[DrawnPicture], bool]:
        """The picture, and whether the effort was another's. Raises what the queue and `draw_well` raise."""
        return await self._flights.join(
            picture_digest(job), "", lambda audience: self._draw(job, whom, audience), listener
        )

    async def _draw(self, job: Job, whom: For, audience: Audience) -> Judged[DrawnPicture]:
        loop = asyncio.get_running_loop()

        async def once(job: Job) -> engine.Drawing[DrawnPicture]:
            def tell(event: Event) -> None:
                ticket.wants_previews = audience.wants_previews  # who joined late may want them
                audience.tell(_progress_of(event))

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

        options, facts = self._options, facts_of(job.model, self._options.models)
        redraws = facts.bumpy_redraws if options.bumpy_redraws is None else options.bumpy_redraws
        remedy = Remedy(redraws, options.limits.max_steps, facts, lambda text: self._fit(job.model, text))
        return await draw_well(job, once, remedy)

    def _fit(self, model: str, text: str) -> str:
        facts = facts_of(model, self._options.models)
        return shorten_too_long_text(text, facts.text_tokens, lambda t: self._count_tokens(model, t))


def _tell_soon(loop: asyncio.AbstractEventLoop, tell: Callable[[Event], None], event: Event) -> None:
    """Carry the news of a job under way from the queue's thread to the event loop; its end is told by its result."""
    if event.kind in (EventKind.QUEUED, EventKind.STARTED, EventKind.STEP) and not loop.is_closed():
        loop.call_soon_threadsafe(tell, event)


def _progress_of(event: Event) -> Progress:
    return Progress(event.kind, event.step, event.steps, event.position, event.eta_seconds, event.preview)
