"""The tab that repaints what was painted over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr
from PIL import Image

from stable_diffusion_server.image_processing import feathered
from stable_diffusion_server.ui import asking, masks, telling
from stable_diffusion_server.ui.desk import Wish
from stable_diffusion_server.ui.desks import Desks
from stable_diffusion_server.ui.tabs import panel, ways
from stable_diffusion_server.ui.tabs.fields import QUIET, Slots, common_of, fields, prompt_box

Edited = dict[str, Any] | None


@dataclass(frozen=True, slots=True)
class Inpaint:
    """What others touch: the editor, and the panel."""

    editor: gr.ImageEditor
    panel: panel.Panel


def tab(desks: Desks, blocks: gr.Blocks) -> Inpaint:
    """Lay the tab out here."""
    slots = Slots("inpaint")
    with gr.Row(elem_classes="sds-desk"):
        with gr.Column(elem_classes="sds-ask"):
            editor = _editor(slots)
            prompt = prompt_box(slots, "What should be there instead?")
            draw, cancel = panel.buttons()
        at = panel.place(telling.EMPTY_INPAINT)
        with gr.Column(elem_classes="sds-settings"):
            with gr.Column(visible=False) as masked:
                seen = gr.Image(
                    label="Mask: what is striped is drawn anew", interactive=False, height=220, format="png", buttons=[]
                )
            strength, feather, refine = _settings(slots)
            chosen = fields(slots, prompt)
    with at.results:
        slider = ways.comparison()
    here = panel.panel(slots, draw, cancel, chosen, at, beside=True)
    ways.compare(desks, here, slider, editor, _background)

    def wishes(edited: Edited, strength: float, feather: float, refine: bool, *values: Any) -> list[Wish]:
        if edited is None or edited["background"] is None:
            raise asking.UnfitError("image_file", "Choose a picture first.")
        image, mask = edited["background"], _mask(edited)
        if not mask.any():
            raise asking.UnfitError("mask_file", "Paint over the part that is to be drawn anew first.")
        common, files = common_of(*values), (masks.png(image), masks.png(mask))
        return asking.inpaint(common, *files, strength, feather, refine=refine)

    def look(edited: Edited, feather: float) -> tuple[Any, Any]:
        if edited is None or edited["background"] is None or not (mask := _mask(edited)).any():
            return None, gr.Column(visible=False)
        return masks.previewed(edited["background"], feathered(mask, int(feather))), gr.Column(visible=True)

    inputs = [editor, strength, feather, refine, *chosen.inputs]
    panel.wire(desks, blocks, here, [draw.click, prompt.submit], inputs, wishes)
    watched = [editor.change, editor.input, feather.change]
    gr.on(watched, look, [editor, feather], [seen, masked], trigger_mode="always_last", **QUIET)
    return Inpaint(editor, here)


def _settings(slots: Slots) -> tuple[gr.Slider, gr.Slider, gr.Checkbox]:
    """How much is drawn anew, how it fades in, and whether it is gone over once more."""
    strength = gr.Slider(
        0,
        1,
        1,
        step=0.01,
        label="Strength",
        info="How much is drawn anew inside the mask.",
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


def _editor(slots: Slots) -> gr.ImageEditor:
    """The picture, and a brush to paint over it; undo is the editor's own."""
    editor = gr.ImageEditor(
        label="Picture and mask",
        type="numpy",
        image_mode="RGBA",
        format="png",
        sources=["upload", "clipboard", "webcam"],
        transforms=(),
        layers=False,
        brush=gr.Brush(default_size=32, colors=["#ffffff"], color_mode="fixed"),
        eraser=gr.Eraser(default_size=32),
        fixed_canvas=False,
        height=420,
        placeholder="Upload or paste a picture",
        elem_id=slots.id_of("image_file"),
    )
    slots.slot("image_file", "mask_file")
    return editor


def _mask(edited: dict[str, Any]) -> masks.Pixels:
    height, width = edited["background"].shape[:2]
    return masks.painted(edited["layers"], height, width)


def _background(edited: Edited) -> Image.Image | None:
    """The picture under what was painted."""
    return Image.fromarray(edited["background"]) if edited and edited["background"] is not None else None
