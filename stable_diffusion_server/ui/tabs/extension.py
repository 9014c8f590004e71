"""Fields of outpainting and of soft masks, in the Inpaint tab."""

from __future__ import annotations

from typing import Any

import gradio as gr

from stable_diffusion_server.ui import forms
from stable_diffusion_server.ui.tabs.controls import ControlSlots

# The number of components that `fields` adds.
COUNT = 6
_SIDES = ("left", "right", "top", "bottom")


def fields(slots: ControlSlots) -> list[Any]:
    """Add the fields, closed: the four sides, their overlap and the soft mask, as `values_of` takes them."""
    with gr.Accordion("Extend the picture, soft mask", open=False):
        sides: list[gr.Slider] = []
        for pair in (_SIDES[:2], _SIDES[2:]):  # four in a row would be cut off
            with gr.Row():
                sides += [_pixels(slots, f"extend_{side}", side.capitalize(), 1024, 64) for side in pair]
        slots.slot(*(f"extend_{side}" for side in _SIDES))
        overlap = _pixels(slots, "extend_overlap", "Overlap", 256, 1, "Pixels of the old picture that fade.")
        slots.slot("extend_overlap")
        soft = gr.Checkbox(
            label="Soft mask",
            info="A grey rim says how much is changed there; needs a feather.",
            elem_id=slots.id_of("mask_mode"),
        )
        slots.slot("mask_mode")
    return [*sides, overlap, soft]


def _pixels(slots: ControlSlots, name: str, label: str, most: int, step: int, info: str | None = None) -> gr.Slider:
    return gr.Slider(0, most, 0, step=step, label=label, info=info, min_width=140, elem_id=slots.id_of(name))


def values_of(*values: Any) -> dict[str, str]:
    """Return the request fields of what is extended and of a soft mask."""
    *pixels, soft = values
    names = [*(f"extend_{side}" for side in _SIDES), "extend_overlap"]
    given = {name: forms.number(value) for name, value in zip(names, pixels, strict=True) if value}
    return {**given, **({"mask_mode": "soft"} if soft else {})}


def extends(more: dict[str, str]) -> bool:
    """Return whether a side is extended."""
    return any(f"extend_{side}" in more for side in _SIDES)
