"""Where the pictures of a click appear, the same in every tab that draws: progress, Cancel, gallery, ways on."""

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

# Told anew at each change: a button whose change does not name its text loses it.
DRAW, CANCEL = "Draw", "Cancel"
_IN_MORE = {"negative_prompt", "num_inference_steps", "guidance_scale"}


def client_for(clients: ApiClients, request: gr.Request) -> ApiClient:
    """Return the API client of the visitor."""
    return clients.of(_inner(request))


def owner_of(clients: ApiClients, request: gr.Request) -> str:
    """The name under which the pictures of who clicked are kept."""
    return clients.owner_of(_inner(request))


def _inner(request: gr.Request) -> Request:
    inner = request.request
    assert inner is not None  # noqa: S101  # only Gradio's own client has none; tells the type checker
    return inner


def index_of(event: gr.SelectData) -> int:
    """Which picture of a gallery was chosen; the first where a page does not say."""
    return event.index if isinstance(event.index, int) else 0


@dataclass(frozen=True, slots=True)
class ResultsPanel:
    """The components. `jobs` holds the ids under way, `shown` the receipts in the gallery, `chosen` which is picked.

    `kept` holds the ids under way in the browser, so that a page that is loaded again goes on with them. `results` is
    what is seen once there are pictures; `slots` stand below the fields.
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
    kept: gr.BrowserState
    slots: ControlSlots

    @property
    def outputs(self) -> list[Any]:
        """What changes while pictures are drawn."""
        pictures = [self.message, self.results, self.gallery, self.made, self.jobs, self.shown, self.chosen]
        buttons = [self.fields.seed, self.kept, self.draw, self.cancel, self.fields.more]
        return [*pictures, *buttons, *self.slots.below.values()]

    def outputs_of(self, shown: job_updates.GalleryUpdate) -> Outputs:
        """What a moment of drawing changes."""
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
            # So that keeping a seed keeps that of what is seen.
            str(shown.receipts[0]["seed"]) if shown.over and shown.receipts else gr.skip(),
            [] if shown.over else list(shown.jobs) if shown.fresh else gr.skip(),
            gr.Button(DRAW, interactive=shown.over),
            gr.Button(CANCEL, variant="secondary" if shown.over else "stop", interactive=not shown.over),
            gr.Accordion(open=True) if opened else gr.skip(),
            *(self.slots.messages(shown.faults) if changed else [gr.skip()] * len(self.slots.below)),
        )


def buttons() -> tuple[gr.Button, gr.Button]:
    """The button that draws, and the one that ends it."""
    with gr.Row():
        draw = gr.Button(DRAW, variant="primary", scale=3, min_width=120)
        cancel = gr.Button(CANCEL, variant="secondary", interactive=False, scale=1, min_width=90)
    return draw, cancel


@dataclass(frozen=True, slots=True)
class PanelSlots:
    """The message area, and the results, which are hidden until there are any."""

    message: gr.HTML
    results: gr.Column


def place(empty: str) -> PanelSlots:
    """Add the places of the results; `empty` is the HTML shown before the first."""
    with gr.Column(elem_classes="sds-result"):
        return PanelSlots(gr.HTML(empty), gr.Column(visible=False))


def panel(
    slots: ControlSlots, draw: gr.Button, cancel: gr.Button, fields: SharedControls, at: PanelSlots, *, beside: bool
) -> ResultsPanel:
    """Lay the results out, for buttons that are elsewhere; small where they are shown `beside` something."""
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
    # Ids are of no use to who has not the key they came with; the secret only lets another process read them.
    kept = gr.BrowserState([], storage_key=f"studio-{slots.tab}", secret="studio")  # noqa: S106  # none is kept there
    states = gr.State([]), gr.State([]), gr.State(0)
    return ResultsPanel(draw, cancel, at.message, at.results, gallery, made, *states, fields, kept, slots)


def wire(
    clients: ApiClients,
    blocks: gr.Blocks,
    here: ResultsPanel,
    triggers: Sequence[Any],
    inputs: Sequence[Any],
    requests_of: Callable[..., Awaitable[list[UiRequest]]],
    js: str | None = None,
) -> None:
    """Have `triggers` draw what `requests_of` makes of the inputs, Cancel end it, and a new page go on with it.

    `requests_of` is also given the name of the visitor; `js` is run in the page before the inputs are sent.
    """
    # A page that is not wholly laid out yet sends nothing for some fields; theirs are what they begin with.
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
        del requests  # they hold whole pictures
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
        yield (gr.skip(),) * len(here.outputs)  # whoever says nothing empties everything
        async for shown in job_updates.resume(client_for(clients, request), jobs or []):
            yield here.outputs_of(shown)

    blocks.load(resume, here.kept, here.outputs, **QUIET)
    gr.on(triggers, draw, list(inputs), here.outputs, js=js, **QUIET)
    here.cancel.click(cancel, here.jobs, here.message, **QUIET)

    def choose(event: gr.SelectData) -> int:
        return index_of(event)

    here.gallery.select(choose, None, here.chosen, **QUIET)
