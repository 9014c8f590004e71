"""The tab that draws from a prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr

from stable_diffusion_server.ui import asking
from stable_diffusion_server.ui.desk import Wish
from stable_diffusion_server.ui.desks import Desks
from stable_diffusion_server.ui.tabs import panel
from stable_diffusion_server.ui.tabs.fields import common_of, fields, prompt_box

_USUAL = (512, 512)


@dataclass(frozen=True, slots=True)
class Create:
    """What others touch: the prompt, its examples, the words beside them, and the panel."""

    prompt: gr.Textbox
    examples: gr.Dataset
    words: gr.Markdown
    panel: panel.Panel
    below: gr.Column


def tab(desks: Desks, blocks: gr.Blocks) -> Create:
    """Lay the tab out here."""
    with gr.Row():
        with gr.Column(min_width=300):
            prompt = prompt_box("What should be in the picture? Enter draws it.")
            draw, cancel = panel.buttons()
            examples = gr.Dataset(
                label="Try one of these",
                components=[gr.Textbox(visible=False)],
                samples=[[text] for text in asking.EMBEDDED_PROMPTS],
                type="values",
            )
            words = gr.Markdown(asking.EMBEDDED_WORDS, elem_classes="sds-words")
            width, height = _sizes()
            chosen = fields(prompt)
            explore = gr.Checkbox(
                label="Explore",
                info="Six pictures: the prompt alone, then with awesome, amazing, anime hd … behind it.",
            )
        with gr.Column(min_width=300):
            here = panel.panel("create", draw, cancel, chosen.seed)
            below = gr.Column()

    def wishes(width: float | None, height: float | None, explore: bool, *values: Any) -> list[Wish]:
        return asking.create(common_of(*values), width, height, explore=explore)

    examples.click(lambda row: row[0], examples, prompt, show_progress="hidden", api_visibility="private")
    panel.wire(desks, blocks, here, [draw.click, prompt.submit], [width, height, explore, *chosen.inputs], wishes)
    return Create(prompt, examples, words, here, below)


def _sizes() -> tuple[gr.Number, gr.Number]:
    """Presets, and the two sides for any other size."""
    sizes = [(f"{width} × {height}", f"{width}x{height}") for width, height in asking.SIZES]
    preset = gr.Radio(sizes, value="{}x{}".format(*_USUAL), label="Size")
    with gr.Row():
        width = gr.Number(_USUAL[0], label="Width", precision=0, min_width=100)
        height = gr.Number(_USUAL[1], label="Height", precision=0, min_width=100)

    def size(chosen: str) -> list[int]:
        return [int(side) for side in chosen.split("x")]

    preset.input(size, preset, [width, height], show_progress="hidden", api_visibility="private")
    return width, height
