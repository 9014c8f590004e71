"""The inpainting tab: generates the painted part of an image again."""

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
from stable_diffusion_server.ui.tabs import extension, navigation, results_panel
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
class InpaintTab:
    """Components that other tabs use: the editor, and the results panel."""

    editor: gr.HTML
    panel: results_panel.ResultsPanel


def tab(clients: ApiClients, intake: ImageIntake, blocks: gr.Blocks) -> InpaintTab:
    """Build the tab."""
    slots = ControlSlots("inpaint")
    with gr.Row(elem_classes="sds-layout"):
        with gr.Column(elem_classes="sds-ask"):
            editor = picture_field("Picture and mask", paints=True, elem_id=slots.id_of("image_file"))
            slots.slot("image_file", "mask_file")
            prompt = prompt_box(slots, "What should be there instead?")
            draw, cancel = results_panel.buttons()
        at = results_panel.place(progress.EMPTY_INPAINT)
        with gr.Column(elem_classes="sds-settings"):
            seen = gr.HTML()
            strength, feather, refine = _settings(slots)
            beyond = extension.fields(slots)
            chosen = fields(slots, prompt)
    with at.results:
        beside = gr.HTML()
    here = results_panel.panel(slots, draw, cancel, chosen, at, beside=True)
    navigation.compare(here, beside, editor)

    async def requests(
        owner: str, value: str | None, strength: float, feather: float, refine: bool, *values: Any
    ) -> list[UiRequest]:
        picture, mask = tokens_of(value)
        if not picture:
            raise forms.FormError("image_file", "Choose a picture first.")
        common, more = common_fields(*values[: -extension.COUNT]), extension.values_of(*values[-extension.COUNT :])
        white = await intake.work(owner, [mask], image_intake.painted) if mask else b""
        if not white and not extension.extends(more):
            raise forms.FormError("mask_file", "Paint over the part to replace first, or extend a side.")
        files = intake.file(owner, picture), white or None
        return forms.inpaint(replace(common, more=more), *files, strength, feather, refine=refine)

    async def look(request: gr.Request, value: str | None, feather: float) -> str:
        painted = tokens_of(value)
        if not all(painted):
            return ""
        try:
            made = partial(image_intake.previewed, feather=int(feather))
            striped = await intake.work(results_panel.owner_of(clients, request), painted, made)
        except ServerError as error:
            return progress.alert(error.detail)
        return progress.figure("Mask: the striped part is replaced", striped) if striped else ""

    inputs = [editor, strength, feather, refine, *chosen.inputs, *beyond]
    results_panel.wire(
        clients, blocks, here, [draw.click, prompt.submit], inputs, requests, settled(slots.id_of("image_file"))
    )
    gr.on([editor.change, feather.change], look, [editor, feather], seen, trigger_mode="always_last", **QUIET)
    return InpaintTab(editor, here)


def _settings(slots: ControlSlots) -> tuple[gr.Slider, gr.Slider, gr.Checkbox]:
    """Add strength, feather and the second pass."""
    strength = gr.Slider(
        0,
        1,
        1,
        step=0.01,
        label="Strength",
        info="How much changes inside the mask.",
        elem_id=slots.id_of("strength"),
    )
    slots.slot("strength")
    feather = gr.Slider(
        0,
        64,
        0,
        step=1,
        label="Feather",
        info="Pixels over which it fades in from its rim.",
        elem_id=slots.id_of("feather"),
    )
    slots.slot("feather")
    return strength, feather, gr.Checkbox(True, label="Refine", info="A second pass at low strength.")
