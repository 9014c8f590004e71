"""The tab that enlarges a picture without a prompt."""

from __future__ import annotations

from collections.abc import AsyncIterator
from html import escape

import gradio as gr

from stable_diffusion_server.errors import ServerError
from stable_diffusion_server.ui import forms
from stable_diffusion_server.ui.client import ApiClients, Job, RefusedError
from stable_diffusion_server.ui.html import progress
from stable_diffusion_server.ui.image_intake import ImageIntake
from stable_diffusion_server.ui.tabs.controls import QUIET, ControlSlots, picture_field, settled, tokens_of
from stable_diffusion_server.ui.tabs.results_panel import client_for, owner_of

_EMPTY = "Choose a picture, then enlarge it."


def tab(clients: ApiClients, intake: ImageIntake) -> None:
    """Build the tab."""
    slots = ControlSlots("upscale")
    with gr.Row(elem_classes="sds-layout"):
        with gr.Column(elem_classes="sds-ask"):
            image = picture_field("Picture to enlarge", paints=False, elem_id=slots.id_of("image_file"))
            upscaler = gr.Dropdown(
                [*forms.UPSCALERS],
                value="embedded-2x",
                allow_custom_value=True,
                label="Upscaler",
                info="Or the name of an upscaler file.",
                elem_id=slots.id_of("upscaler"),
            )
            scale = gr.Slider(1, 8, 2, step=0.25, label="Scale", elem_id=slots.id_of("scale"))
            enlarge = gr.Button("Enlarge", variant="primary")
        with gr.Column(elem_classes="sds-result"):
            result = gr.HTML(_said(_EMPTY))

    async def work(
        request: gr.Request, value: str | None, upscaler: str | None, scale: float | None
    ) -> AsyncIterator[str]:
        token, _ = tokens_of(value)
        if not token:
            yield progress.alert("Choose a picture first.")
            return
        client = client_for(clients, request)
        try:
            file = intake.file(owner_of(clients, request), token)
            job = await client.start(forms.upscale(file, (upscaler or "").strip(), scale))
            async for _, event in client.events(job["id"]):
                yield _shown(event)
        except (RefusedError, ServerError) as error:
            yield progress.alert(error.detail)

    enlarge.click(work, [image, upscaler, scale], result, js=settled(slots.id_of("image_file")), **QUIET)


def _shown(job: Job) -> str:
    """Return the state of an enlargement, or its result."""
    if job["state"] in ("failed", "cancelled"):
        return progress.alert(progress.sentence(job))
    return _enlarged(job) if job.get("receipt") is not None else _said(progress.sentence(job))


def _said(sentence: str) -> str:
    return f'<div class="sds-message" role="status"><p class="sds-lead">{escape(sentence)}</p></div>'


def _enlarged(job: Job) -> str:
    """Return the result with a link to its file."""
    receipt = job["receipt"]
    url = escape(str(receipt["path"]), quote=True)
    size = f"{receipt['width']} × {receipt['height']} pixels, {escape(str(receipt['model']))}"
    image = f'<img src="{url}" alt="The enlarged picture" style="max-width: 100%">'
    return (
        _said("Done.")
        + f'<figure class="sds-enlarged"><a href="{url}" target="_blank" rel="noopener">{image}</a>'
        + (f"<figcaption>{size}</figcaption></figure>")
    )
