"""Where the pictures of a click appear, the same in every tab that draws: progress, Cancel, gallery, ways on."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from stable_diffusion_server.ui import following, telling
from stable_diffusion_server.ui.desk import Desk, RefusedError, Wish
from stable_diffusion_server.ui.desks import Desks

Outputs = tuple[Any, ...]

# Told anew at each change: a button whose change does not name its text loses it.
DRAW, CANCEL = "Draw", "Cancel"


def desk_of(desks: Desks, request: gr.Request) -> Desk:
    """The desk of who clicked."""
    inner = request.request
    assert inner is not None  # noqa: S101  # only Gradio's own client has none; tells the type checker
    return desks.of(f"{inner.url.scheme}://{inner.headers.get('host', '')}", request.cookies)


@dataclass(frozen=True, slots=True)
class Panel:
    """The components. `jobs` holds the ids under way, `shown` the receipts in the gallery, `chosen` which is picked.

    `kept` holds the ids under way in the browser, so that a page that is loaded again goes on with them.
    """

    draw: gr.Button
    cancel: gr.Button
    told: gr.HTML
    gallery: gr.Gallery
    made: gr.HTML
    jobs: gr.State
    shown: gr.State
    chosen: gr.State
    seed: gr.Textbox
    kept: gr.BrowserState

    @property
    def outputs(self) -> list[Any]:
        """What changes while pictures are drawn."""
        pictures = [self.told, self.gallery, self.made, self.jobs, self.shown, self.chosen, self.seed]
        return [*pictures, self.kept, self.draw, self.cancel]


def buttons() -> tuple[gr.Button, gr.Button]:
    """The button that draws, and the one that ends it."""
    with gr.Row():
        draw = gr.Button(DRAW, variant="primary", scale=3)
        cancel = gr.Button(CANCEL, variant="stop", interactive=False, scale=1)
    return draw, cancel


def panel(name: str, draw: gr.Button, cancel: gr.Button, seed: gr.Textbox) -> Panel:
    """Lay the panel out here, for buttons that are elsewhere."""
    told = gr.HTML(elem_classes="sds-news")
    gallery = gr.Gallery(
        label="Pictures",
        columns=2,
        object_fit="contain",
        interactive=False,
        height="auto",
        buttons=["download", "fullscreen"],
        elem_classes="sds-gallery",
    )
    made = gr.HTML()
    # Ids are of no use to who has not the key they came with; the secret only lets another process read them.
    kept = gr.BrowserState([], storage_key=f"studio-{name}", secret="studio")  # noqa: S106  # none is kept there
    return Panel(draw, cancel, told, gallery, made, gr.State([]), gr.State([]), gr.State(0), seed, kept)


def wire(
    desks: Desks,
    blocks: gr.Blocks,
    here: Panel,
    triggers: Sequence[Any],
    inputs: Sequence[Any],
    wishes_of: Callable[..., list[Wish]],
) -> None:
    """Have `triggers` draw what `wishes_of` makes of the inputs, Cancel end it, and a new page go on with it."""
    # A page that is not wholly laid out yet sends nothing for some fields; theirs are what they begin with.
    firsts = [getattr(field, "value", None) for field in inputs]

    async def draw(request: gr.Request, *values: Any) -> AsyncIterator[Outputs]:
        try:
            wishes = wishes_of(
                *(first if value is None else value for value, first in zip(values, firsts, strict=True))
            )
        except ValueError as error:
            yield _outputs(following.Shown(telling.alert(str(error)), over=True))
            return
        async for shown in following.draw(desk_of(desks, request), wishes):
            yield _outputs(shown)

    async def cancel(request: gr.Request, jobs: list[str]) -> Any:
        for job in jobs:
            try:
                await desk_of(desks, request).cancel(job)
            except RefusedError as error:
                return telling.alert(error.detail)
        return gr.skip()

    async def resume(request: gr.Request, jobs: list[str] | None) -> AsyncIterator[Outputs]:
        async for shown in following.resume(desk_of(desks, request), jobs or []):
            yield _outputs(shown)

    blocks.load(resume, here.kept, here.outputs, show_progress="hidden", api_visibility="private")
    gr.on(triggers, draw, list(inputs), here.outputs, show_progress="hidden", api_visibility="private")
    here.cancel.click(cancel, here.jobs, here.told, show_progress="hidden", api_visibility="private")

    def choose(event: gr.SelectData) -> int:
        return int(event.index)

    here.gallery.select(choose, None, here.chosen, show_progress="hidden", api_visibility="private")


def _outputs(shown: following.Shown) -> Outputs:
    """What a moment of drawing changes."""
    changed = shown.fresh or shown.over
    return (
        shown.told,
        shown.pictures if changed else gr.skip(),
        shown.made if changed else gr.skip(),
        list(shown.jobs),
        list(shown.receipts) if changed else gr.skip(),
        0 if changed else gr.skip(),
        # So that keeping a seed keeps that of what is seen.
        str(shown.receipts[0]["seed"]) if shown.over and shown.receipts else gr.skip(),
        [] if shown.over else list(shown.jobs) if shown.fresh else gr.skip(),
        gr.Button(DRAW, interactive=shown.over),
        gr.Button(CANCEL, interactive=not shown.over),
    )
