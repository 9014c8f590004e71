"""Fields of the sampler, the spacing of its steps, styles and seamless borders, of the Create tab."""

from __future__ import annotations

from typing import Any

import gradio as gr

from stable_diffusion_server.ui.tabs.controls import ControlSlots

# The number of components that `fields` adds.
COUNT = 4
_USUAL = "the model's"
_SAMPLERS = (
    "euler euler_a heun dpm_2m dpm dpm_3m_sde dpm_sde dpm_2s dpm_2s_a unipc deis lms kdpm2 kdpm2_a ddim ddpm pndm lcm "
    "tcd er_sde flow_euler flow_heun"
).split()
_SCHEDULES = "normal karras exponential beta trailing ddim_uniform ays".split()
_TILINGS = [("none", ""), ("left to right", "x"), ("top to bottom", "y"), ("both", "both")]


def fields(slots: ControlSlots) -> list[Any]:
    """Add the fields, closed, in the order in which `values_of` takes them."""
    with gr.Accordion("Sampler, styles, tiling", open=False):
        with gr.Row():
            scheduler, schedule = (
                gr.Dropdown(
                    [(_USUAL, ""), *((one, one) for one in choices)],
                    value="",
                    label=label,
                    min_width=140,
                    elem_id=slots.id_of(name),
                )
                for label, name, choices in (
                    ("Sampler", "scheduler", _SAMPLERS),
                    ("Spacing of the steps", "schedule", _SCHEDULES),
                )
            )
        slots.slot("scheduler", "schedule")
        styles = gr.Textbox(
            label="Styles",
            placeholder="none",
            info="Names, separated by commas.",
            max_length=1000,
            elem_id=slots.id_of("styles"),
        )
        tiling = gr.Dropdown(
            _TILINGS,
            value="",
            label="Tiling",
            info="Borders that meet when the picture is repeated.",
            elem_id=slots.id_of("tiling"),
        )
        slots.slot("styles", "tiling")
    return [scheduler, schedule, styles, tiling]


def values_of(
    scheduler: str | None, schedule: str | None, styles: str | None, tiling: str | None
) -> dict[str, str | list[str]]:
    """Return the request fields, without those that are left to the server."""
    named = [name.strip() for name in (styles or "").split(",") if name.strip()]
    given = {"scheduler": scheduler, "schedule": schedule, "tiling": tiling}
    return {**{name: value for name, value in given.items() if value}, **({"styles": named} if named else {})}
