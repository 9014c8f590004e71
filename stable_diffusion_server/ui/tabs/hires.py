"""Fields of a second pass over the enlarged picture ("hires fix"), which Create and Restyle share."""

from __future__ import annotations

from typing import Any

import gradio as gr

from stable_diffusion_server.ui import forms
from stable_diffusion_server.ui.tabs.controls import ControlSlots

# The number of components that `fields` adds.
COUNT = 4


def fields(slots: ControlSlots) -> list[Any]:
    """Add the fields, closed: upscaler, scale, steps and strength, in the order in which `values_of` takes them."""
    with gr.Accordion("Second pass (hires fix)", open=False):
        scale = gr.Slider(
            1,
            4,
            1,
            step=0.05,
            label="Enlarge by",
            info="Above 1 the picture is enlarged and drawn again.",
            elem_id=slots.id_of("hires_scale"),
        )
        slots.slot("hires_scale")
        upscaler = gr.Dropdown(
            [*forms.UPSCALERS, *forms.LATENT_UPSCALERS],
            value=forms.UPSCALERS[0],
            allow_custom_value=True,
            label="Second pass upscaler",
            info="A latent one needs a strength of 0.5 or more.",
            elem_id=slots.id_of("hires_upscaler"),
        )
        slots.slot("hires_upscaler")
        strength = gr.Slider(
            0,
            1,
            0.35,
            step=0.01,
            label="Second pass strength",
            info="How much the second pass changes.",
            elem_id=slots.id_of("hires_strength"),
        )
        steps = gr.Textbox(
            label="Second pass steps",
            placeholder="as in the first",
            max_length=20,
            elem_id=slots.id_of("hires_steps"),
        )
        slots.slot("hires_strength", "hires_steps")
    return [scale, upscaler, strength, steps]


def values_of(scale: float | None, upscaler: str | None, strength: float | None, steps: str | None) -> dict[str, str]:
    """Return the request fields of a second pass; none if nothing is enlarged."""
    if scale is None or scale <= 1:
        return {}
    given = {
        "hires_scale": forms.number(scale),
        "hires_upscaler": (upscaler or "").strip(),
        "hires_strength": forms.number(strength),
        "hires_steps": (steps or "").strip(),
    }
    return {name: value for name, value in given.items() if value}
