"""The tab that edits images by instruction, with the models that look at reference images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr

from stable_diffusion_server.ui import forms, model_options
from stable_diffusion_server.ui.client import ApiClients, UiRequest
from stable_diffusion_server.ui.html import progress
from stable_diffusion_server.ui.image_intake import ImageIntake
from stable_diffusion_server.ui.tabs import navigation, results_panel
from stable_diffusion_server.ui.tabs.controls import (
    ControlSlots,
    common_fields,
    defaults_of,
    fields,
    prompt_box,
    references_field,
    references_of,
    settled,
)


@dataclass(frozen=True, slots=True)
class EditTab:
    """Components that other tabs use: the images, the sentence of how many a model takes, and the results panel."""

    references: gr.HTML
    takes: gr.HTML
    panel: results_panel.ResultsPanel

    @property
    def of_models(self) -> list[Any]:
        """The components that `options_of` fills."""
        return [self.panel.fields.model, self.takes, *self.panel.fields.model_defaults]


def tab(clients: ApiClients, intake: ImageIntake, blocks: gr.Blocks) -> EditTab:
    """Build the tab."""
    slots = ControlSlots("edit")
    with gr.Row(elem_classes="sds-layout"):
        with gr.Column(elem_classes="sds-ask"):
            references = references_field("Pictures", elem_id=slots.id_of("image_file"))
            slots.slot("image_file")
            takes = gr.HTML()
            prompt = prompt_box(slots, "What should be done with them?")
            draw, cancel = results_panel.buttons()
        at = results_panel.place(progress.EMPTY_EDIT)
        with gr.Column(elem_classes="sds-settings"):
            width, height = _sides(slots)
            chosen = fields(slots, prompt)
    with at.results:
        beside = gr.HTML()
    here = results_panel.panel(slots, draw, cancel, chosen, at, beside=True)
    navigation.compare(here, beside, references)

    async def requests(
        owner: str, value: str | None, width: str | None, height: str | None, *values: Any
    ) -> list[UiRequest]:
        tokens = references_of(value)
        if not tokens:
            raise forms.FormError("image_file", "Choose a picture to edit first.")
        if len(tokens) > forms.MOST_REFERENCES:
            raise forms.FormError("image_file", f"Choose at most {forms.MOST_REFERENCES} pictures.")
        files = tuple(intake.file(owner, token) for token in tokens)
        return forms.edit(common_fields(*values), files, (width or "").strip(), (height or "").strip())

    inputs = [references, width, height, *chosen.inputs]
    results_panel.wire(
        clients, blocks, here, [draw.click, prompt.submit], inputs, requests, settled(slots.id_of("image_file"))
    )
    return EditTab(references, takes, here)


def takes_of(models: model_options.Models, name: str) -> str:
    """Return how many images a model looks at, or that no model looks at any, as HTML."""
    able = model_options.editing(models)
    sentence = model_options.most_references(model_options.chosen(able, name))
    return progress.hint(sentence) if able else progress.remark(sentence)


def options_of(models: model_options.Models) -> list[Any]:
    """Return updates of `EditTab.of_models` for the server's models: the first one that edits is chosen."""
    able = model_options.editing(models)
    first = model_options.names(able)[0] if able else ""
    picker = gr.Dropdown(choices=model_options.editing_choices(able), value=first)
    return [picker, takes_of(models, first), *defaults_of(able, first)]


def _sides(slots: ControlSlots) -> tuple[gr.Textbox, gr.Textbox]:
    """Add the size, which is that of the first image if it is left empty."""
    with gr.Row():
        width, height = (
            gr.Textbox(
                label=label,
                placeholder="as the first picture",
                max_length=20,
                min_width=120,
                elem_id=slots.id_of(label.lower()),
            )
            for label in ("Width", "Height")
        )
    slots.slot("width", "height")
    return width, height
