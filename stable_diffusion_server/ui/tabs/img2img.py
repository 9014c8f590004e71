"""The tab that generates an image from an image, optionally guided by its edges."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import gradio as gr

from stable_diffusion_server.errors import ServerError
from stable_diffusion_server.ui import forms, image_intake
from stable_diffusion_server.ui.client import ApiClients, UiRequest
from stable_diffusion_server.ui.html import progress
from stable_diffusion_server.ui.image_intake import ImageIntake
from stable_diffusion_server.ui.tabs import control_units, hires, navigation, results_panel
from stable_diffusion_server.ui.tabs.controls import (
    QUIET,
    ControlSlots,
    common_fields,
    fields,
    picture_field,
    prompt_box,
    settled,
    tokens_of,
)


@dataclass(frozen=True, slots=True)
class ImageToImageTab:
    """Components that other tabs use: the input image, the results panel, and the control units."""

    image: gr.HTML
    panel: results_panel.ResultsPanel
    guides: control_units.UnitControls


def tab(clients: ApiClients, intake: ImageIntake, blocks: gr.Blocks) -> ImageToImageTab:
    """Build the tab."""
    slots = ControlSlots("restyle")
    with gr.Row(elem_classes="sds-layout"):
        with gr.Column(elem_classes="sds-ask"):
            image = picture_field("Picture", paints=False, elem_id=slots.id_of("image_file"))
            slots.slot("image_file")
            prompt = prompt_box(slots, "What should it become?")
            draw, cancel = results_panel.buttons()
        at = results_panel.place(progress.EMPTY_RESTYLE)
        with gr.Column(elem_classes="sds-settings"):
            strength = gr.Slider(
                0,
                1,
                0.6,
                step=0.01,
                label="Strength",
                info="0 keeps the picture, 1 replaces it.",
                elem_id=slots.id_of("strength"),
            )
            slots.slot("strength")
            edges = _edges(clients, intake, slots, image)
            chosen = fields(slots, prompt)
            again = hires.fields(slots)
            guides = control_units.units(clients, intake, slots, image)
    with at.results:
        beside = gr.HTML()
    here = results_panel.panel(slots, draw, cancel, chosen, at, beside=True)
    navigation.compare(here, beside, image)

    async def requests(
        owner: str, value: str | None, strength: float, canny: bool, low: float, high: float, *values: Any
    ) -> list[UiRequest]:
        picture, _ = tokens_of(value)
        if not picture:
            raise forms.FormError("image_file", "Choose a picture to start from first.")
        file = intake.file(owner, picture)
        common, further = common_fields(*values[: len(chosen.inputs)]), values[len(chosen.inputs) :]
        common = replace(common, more=hires.values_of(*further[: hires.COUNT]))
        units = control_units.unit_fields(intake, owner, further[hires.COUNT :])
        made = forms.restyle(common, file, strength, canny=canny, low=low, high=high)
        return forms.guided(made, units, has_image=True)

    inputs = [image, strength, *edges, *chosen.inputs, *again, *guides.inputs]
    results_panel.wire(
        clients, blocks, here, [draw.click, prompt.submit], inputs, requests, settled(slots.id_of("image_file"))
    )
    return ImageToImageTab(image, here, guides)


def _edges(
    clients: ApiClients, intake: ImageIntake, slots: ControlSlots, image: gr.HTML
) -> tuple[gr.Checkbox, gr.Slider, gr.Slider]:
    """Add the fields of edge guidance, with a preview of the edges."""
    canny = gr.Checkbox(
        label="Keep the edges (canny)", info="A ControlNet draws along them.", elem_id=slots.id_of("canny")
    )
    slots.slot("canny")
    with gr.Column(visible=False) as more:
        low = gr.Slider(
            *(0, 1000, 100),
            step=1,
            label="Weak edges from",
            info="These count where they touch a strong one.",
            elem_id=slots.id_of("canny_low"),
        )
        high = gr.Slider(0, 1000, 200, step=1, label="Strong edges from", elem_id=slots.id_of("canny_high"))
        slots.slot("canny_low", "canny_high")
        seen = gr.HTML()

    async def look(request: gr.Request, value: str | None, canny: bool, low: float, high: float) -> str:
        picture, _ = tokens_of(value)
        if not picture or not canny:
            return ""
        try:
            made = partial(image_intake.edges, low=int(low), high=int(high))
            return progress.figure(
                "Edges", await intake.work(results_panel.owner_of(clients, request), [picture], made)
            )
        except ServerError as error:
            return progress.alert(error.detail)

    canny.input(lambda canny: gr.Column(visible=canny), canny, more, **QUIET)
    gr.on(
        [image.change, canny.input, low.change, high.change],
        look,
        [image, canny, low, high],
        seen,
        trigger_mode="always_last",
        **QUIET,
    )
    return canny, low, high
