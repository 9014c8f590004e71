"""The fields that every tab that draws has: model, what to leave out, steps, guidance, seed, how many."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any

import gradio as gr

from stable_diffusion_server.ui.asking import MOST_AT_ONCE, SEED_END, Common


@dataclass(frozen=True, slots=True)
class Fields:
    """The components, in the order `common_of` reads their values.

    Numbers that may be left out are texts: Gradio's number fields turn into 0 by themselves, and the server tells what
    is no number.
    """

    prompt: gr.Textbox
    model: gr.Dropdown
    negative: gr.Textbox
    steps: gr.Textbox
    guidance: gr.Textbox
    seed: gr.Textbox
    keep: gr.Checkbox
    count: gr.Slider

    @property
    def inputs(self) -> list[Any]:
        """The components as inputs of a callback."""
        return [
            *(self.prompt, self.model, self.negative, self.steps),
            *(self.guidance, self.seed, self.keep, self.count),
        ]


def prompt_box(placeholder: str) -> gr.Textbox:
    """Where the prompt is written; Enter draws."""
    return gr.Textbox(label="Prompt", placeholder=placeholder, lines=1, max_lines=6, autofocus=True, max_length=4000)


def fields(prompt: gr.Textbox) -> Fields:
    """Lay the fields out here, below a prompt."""
    count = gr.Slider(1, MOST_AT_ONCE, 1, step=1, label="How many")
    with gr.Row():
        seed = gr.Textbox(label="Seed", max_length=20, placeholder="another each time", min_width=140)
        with gr.Column(min_width=140):
            keep = gr.Checkbox(label="Keep this seed", container=False)
            dice = gr.Button("Roll the dice", size="sm")
    with gr.Accordion("More", open=False):
        models = [("As the server prefers", ""), ("SDXL", "sdxl"), ("Flux", "flux")]
        model = gr.Dropdown(models, value="", label="Model")
        negative = gr.Textbox(label="Not in the picture", info="Flux has no use for it.", max_length=4000)
        with gr.Row():
            steps = gr.Textbox(label="Steps", max_length=20, placeholder="as the model likes", min_width=120)
            guidance = gr.Textbox(label="Guidance", max_length=20, placeholder="as the model likes", min_width=120)

    def roll() -> tuple[str, bool]:
        return str(secrets.randbelow(SEED_END)), True

    dice.click(roll, None, [seed, keep], show_progress="hidden", api_visibility="private")
    return Fields(prompt, model, negative, steps, guidance, seed, keep, count)


def common_of(
    prompt: str | None,
    model: str | None,
    negative: str | None,
    steps: str | None,
    guidance: str | None,
    seed: str | None,
    keep: bool,  # values come in the order of the fields
    count: float,
) -> Common:
    """The fields' values; a seed counts when it is kept. Texts that were never shown are `None`."""
    return Common(
        prompt=(prompt or "").strip(),
        negative=(negative or "").strip(),
        model=model or "",
        steps=(steps or "").strip(),
        guidance=(guidance or "").strip(),
        seed=(seed or "").strip() if keep else "",
        count=int(count),
    )
