"""Progress, Cancel button and gallery of a click's images, shared by the generating tabs."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr
from starlette.requests import Request

from stable_diffusion_server.errors import ServerError
from stable_diffusion_server.ui import job_updates
from stable_diffusion_server.ui.client import ApiClient, ApiClients, RefusedError, UiRequest
from stable_diffusion_server.ui.forms import FormError
from stable_diffusion_server.ui.html import progress
from stable_diffusion_server.ui.tabs.controls import QUIET, ControlSlots, SharedControls

Outputs = tuple[Any, ...]

# Part of each update: a Gradio button loses its text if an update omits it.
DRAW, CANCEL = "Draw", "Cancel"
_IN_MORE = {"negative_prompt", "num_inference_steps", "guidance_scale"}


def client_for(clients: ApiClients, request: gr.Request) -> ApiClient:
    """Return the API client of the visitor."""
    return clients.of(_inner(request))


def owner_of(clients: ApiClients, request: gr.Request) -> str:
    """Return the visitor's name, the key of its uploads."""
    return clients.owner_of(_inner(request))


def _inner(request: gr.Request) -> Request:
    inner = request.request
    assert inner is not None  # noqa: S101  # for the type checker: only requests of Gradio's own client have None
    return inner


def index_of(event: gr.SelectData) -> int:
    """Return the index of the chosen image of a gallery; the first if the page sent none."""
    return event.index if isinstance(event.index, int) else 0


@dataclass(frozen=True, slots=True)
class ResultsPanel:
    """The components. `jobs` holds the ids of running jobs, `shown` the receipts in the gallery, `chosen` an index.

    `stored_jobs` holds the ids of running jobs in the browser, so that a reloaded page continues to follow them.
    `results` is visible when there are images; `slots` are below the fields.
    """

    draw: gr.Button
    cancel: gr.Button
    message: gr.HTML
    results: gr.Column
    gallery: gr.Gallery
    made: gr.HTML
    jobs: gr.State
    shown: gr.State
    chosen: gr.State
    fields: SharedControls
    stored_jobs: gr.BrowserState
    slots: ControlSlots

    @property
    def outputs(self) -> list[Any]:
        """The components that change while images are generated."""
        pictures = [self.message, self.results, self.gallery, self.made, self.jobs, self.shown, self.chosen]
        buttons = [self.fields.seed, self.stored_jobs, self.draw, self.cancel, self.fields.more]
        return [*pictures, *buttons, *self.slots.below.values()]

    def outputs_of(self, shown: job_updates.GalleryUpdate) -> Outputs:
        """Return the updates of `outputs`, in their order."""
        changed = shown.fresh or shown.over
        refused = progress.refusal(shown.refused, shown.faults, self.slots.below) if shown.refused else ""
        opened = shown.over and any(name in _IN_MORE for name, _ in shown.faults)
        return (
            refused + shown.message,
            gr.Column(visible=bool(shown.receipts)) if changed else gr.skip(),
            shown.pictures if changed else gr.skip(),
            shown.made if changed else gr.skip(),
            list(shown.jobs),
            list(shown.receipts) if changed else gr.skip(),
            0 if changed else gr.skip(),
            # So that "keep the seed" uses the seed of the shown image.
            str(shown.receipts[0]["seed"]) if shown.over and shown.receipts else gr.skip(),
            [] if shown.over else list(shown.jobs) if shown.fresh else gr.skip(),
            gr.Button(DRAW, interactive=shown.over),
            gr.Button(CANCEL, variant="secondary" if shown.over else "stop", interactive=not shown.over),
            gr.Accordion(open=True) if opened else gr.skip(),
            *(self.slots.messages(shown.faults) if changed else [gr.skip()] * len(self.slots.below)),
        )


def buttons() -> tuple[gr.Button, gr.Button]:
    """Add the buttons that start and cancel a generation."""
    with gr.Row():
        draw = gr.Button(DRAW, variant="primary", scale=3, min_width=120)
        cancel = gr.Button(CANCEL, variant="secondary", interactive=False, scale=1, min_width=90)
    return draw, cancel


@dataclass(frozen=True, slots=True)
class PanelSlots:
    """The message area, and the results, which are hidden while empty."""

    message: gr.HTML
    results: gr.Column


def place(empty: str) -> PanelSlots:
    """Add the containers of the results; `empty` is the HTML shown before the first result."""
    with gr.Column(elem_classes="sds-result"):
        return PanelSlots(gr.HTML(empty), gr.Column(visible=False))


def panel(
    slots: ControlSlots, draw: gr.Button, cancel: gr.Button, fields: SharedControls, at: PanelSlots, *, beside: bool
) -> ResultsPanel:
    """Add the results; the buttons are elsewhere. With `beside`, thumbnails are smaller."""
    with at.results:
        gallery = gr.Gallery(
            label="Pictures",
            columns=4 if beside else 2,
            fit_columns=not beside,
            object_fit="contain",
            interactive=False,
            height="auto",
            buttons=["download", "fullscreen"],
            elem_classes="sds-gallery",
        )
        made = gr.HTML()
    # Gradio encrypts the ids with this secret. They need no protection: only the job's API key can read a job.
    stored_jobs = gr.BrowserState([], storage_key=f"studio-{slots.tab}", secret="studio")  # noqa: S106  # protects nothing
    return ResultsPanel(
        draw=draw,
        cancel=cancel,
        message=at.message,
        results=at.results,
        gallery=gallery,
        made=made,
        jobs=gr.State([]),
        shown=gr.State([]),
        chosen=gr.State(0),
        fields=fields,
        stored_jobs=stored_jobs,
        slots=slots,
    )


def wire(
    clients: ApiClients,
    blocks: gr.Blocks,
    here: ResultsPanel,
    triggers: Sequence[Any],
    inputs: Sequence[Any],
    requests_of: Callable[..., Awaitable[list[UiRequest]]],
    js: str | None = None,
) -> None:
    """Connect the events: `triggers` start the requests, Cancel cancels them, and a reloaded page follows them.

    `requests_of` returns the requests for the visitor's name and the inputs; `js` runs in the page before it sends the
    inputs.
    """
    # A page that is not completely rendered sends null for some fields; replace null by their initial values.
    firsts = [getattr(field, "value", None) for field in inputs]

    async def draw(request: gr.Request, *values: Any) -> AsyncIterator[Outputs]:
        try:
            requests = await requests_of(
                owner_of(clients, request),
                *(first if value is None else value for value, first in zip(values, firsts, strict=True)),
            )
        except FormError as error:
            yield here.outputs_of(
                job_updates.GalleryUpdate(refused=str(error), faults=((error.field, str(error)),), over=True)
            )
            return
        except ServerError as error:
            yield here.outputs_of(job_updates.GalleryUpdate(refused=error.detail, faults=error.faults, over=True))
            return
        drawing = job_updates.draw(client_for(clients, request), requests)
        del requests  # they hold whole image files
        async for shown in drawing:
            yield here.outputs_of(shown)

    async def cancel(request: gr.Request, jobs: list[str]) -> Any:
        for job in jobs:
            try:
                await client_for(clients, request).cancel(job)
            except RefusedError as error:
                return progress.alert(error.detail)
        return gr.skip()

    async def resume(request: gr.Request, jobs: list[str] | None) -> AsyncIterator[Outputs]:
        yield (gr.skip(),) * len(here.outputs)  # an event without output would clear all components
        async for shown in job_updates.resume(client_for(clients, request), jobs or []):
            yield here.outputs_of(shown)

    blocks.load(resume, here.stored_jobs, here.outputs, **QUIET)
    gr.on(triggers, draw, list(inputs), here.outputs, js=js, **QUIET)
    here.cancel.click(cancel, here.jobs, here.message, **QUIET)

    def choose(event: gr.SelectData) -> int:
        return index_of(event)

    here.gallery.select(choose, None, here.chosen, **QUIET)
