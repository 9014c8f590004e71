"""The tab that generates an image from a prompt."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace
from typing import Any

import gradio as gr

from stable_diffusion_server.ui import forms, model_options
from stable_diffusion_server.ui.client import ApiClients, UiRequest
from stable_diffusion_server.ui.html import progress
from stable_diffusion_server.ui.image_intake import ImageIntake
from stable_diffusion_server.ui.tabs import control_units, hires, results_panel, sampling
from stable_diffusion_server.ui.tabs.controls import QUIET, ControlSlots, common_fields, fields, prompt_box


@dataclass(frozen=True, slots=True)
class CreateTab:
    """Components that other tabs use: examples, the text beside them, the size, the results panel, control units."""

    examples: gr.Dataset
    words: gr.Markdown
    size: tuple[gr.Radio, gr.Number, gr.Number]
    panel: results_panel.ResultsPanel
    guides: control_units.UnitControls


def tab(clients: ApiClients, intake: ImageIntake, blocks: gr.Blocks) -> CreateTab:
    """Build the tab."""
    slots = ControlSlots("create")
    with gr.Row(elem_classes="sds-layout"):
        with gr.Column(elem_classes="sds-ask"):
            prompt = prompt_box(slots, "What should be in the picture? Enter draws it.")
            draw, cancel = results_panel.buttons()
        at = results_panel.place(progress.EMPTY)
        with gr.Column(elem_classes="sds-settings"):
            examples = gr.Dataset(
                label="Try one of these",
                components=[gr.Textbox(visible=False)],
                samples=[[text] for text in model_options.EMBEDDED_PROMPTS],
                type="values",
            )
            words = gr.Markdown(model_options.EMBEDDED_WORDS, elem_classes="sds-words")
            preset, width, height = _sizes(slots)
            explore = gr.Checkbox(
                label="Explore",
                info="Six pictures of one seed: the prompt alone, then with awesome, amazing, anime hd … behind it.",
            )
            chosen = fields(slots, prompt)
            sampled = sampling.fields(slots)
            again = hires.fields(slots)
            guides = control_units.units(clients, intake, slots)
    here = results_panel.panel(slots, draw, cancel, chosen, at, beside=False)

    async def requests(
        owner: str, width: float | None, height: float | None, explore: bool, *values: Any
    ) -> list[UiRequest]:
        common = common_fields(*values[: len(chosen.inputs)])
        further = values[len(chosen.inputs) :]
        sampled_values, again_values = further[: sampling.COUNT], further[sampling.COUNT : sampling.COUNT + hires.COUNT]
        common = replace(common, more={**sampling.values_of(*sampled_values), **hires.values_of(*again_values)})
        units = control_units.unit_fields(intake, owner, further[sampling.COUNT + hires.COUNT :])
        if explore and not common.seed:
            common = replace(common, seed=str(secrets.randbelow(forms.SEED_END)))
        return forms.guided(forms.create(common, width, height, explore=explore), units, has_image=False)

    examples.click(lambda row: row[0] if row else gr.skip(), examples, prompt, **QUIET)
    inputs = [width, height, explore, *chosen.inputs, *sampled, *again, *guides.inputs]
    results_panel.wire(clients, blocks, here, [draw.click, prompt.submit], inputs, requests)
    return CreateTab(examples, words, (preset, width, height), here, guides)


def _sizes(slots: ControlSlots) -> tuple[gr.Radio, gr.Number, gr.Number]:
    """Add the size presets, and number fields for any other size."""
    sizes = [(f"{width} × {height}", f"{width}x{height}") for width, height in model_options.SIZES]
    usual = model_options.DEFAULT_SIDE
    preset = gr.Radio(sizes, value=f"{usual}x{usual}", label="Size")
    with gr.Row():
        width = gr.Number(usual, label="Width", precision=0, min_width=100, elem_id=slots.id_of("width"))
        height = gr.Number(usual, label="Height", precision=0, min_width=100, elem_id=slots.id_of("height"))
    slots.slot("width", "height")

    def size(chosen: str) -> list[int]:
        return [int(side) for side in chosen.split("x")]

    preset.input(size, preset, [width, height], **QUIET)
    gr.on([width.input, height.input], model_options.preset, [width, height], preset, **QUIET)
    return preset, width, height
