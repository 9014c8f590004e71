"""The tab that repaints what was painted over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr
from PIL import Image

from stable_diffusion_server.image_processing import feathered
from stable_diffusion_server.ui import asking, masks
from stable_diffusion_server.ui.desk import Wish
from stable_diffusion_server.ui.desks import Desks
from stable_diffusion_server.ui.tabs import panel, ways
from stable_diffusion_server.ui.tabs.fields import common_of, fields, prompt_box

_QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
Edited = dict[str, Any] | None


@dataclass(frozen=True, slots=True)
class Inpaint:
    """What others touch: the editor, and the panel."""

    editor: gr.ImageEditor
    panel: panel.Panel
    below: gr.Column


def tab(desks: Desks, blocks: gr.Blocks) -> Inpaint:
    """Lay the tab out here."""
    with gr.Row():
        with gr.Column(min_width=300):
            editor = _editor()
            prompt = prompt_box("What should be there instead?")
            draw, cancel = panel.buttons()
            strength = gr.Slider(0, 1, 1, step=0.01, label="Strength", info="How much is drawn anew inside the mask.")
            feather = gr.Slider(0, 64, 0, step=1, label="Feather", info="Pixels over which it fades in from its rim.")
            refine = gr.Checkbox(True, label="Refine", info="A second pass at low strength.")
            chosen = fields(prompt)
        with gr.Column(min_width=300):
            here = panel.panel("inpaint", draw, cancel, chosen.seed)
            ways.compare(desks, here, editor, _background)
            below = gr.Column()
            seen = gr.Image(label="Mask", interactive=False, height=240, format="png", buttons=[])

    def wishes(edited: Edited, strength: float, feather: float, refine: bool, *values: Any) -> list[Wish]:
        if edited is None or edited["background"] is None:
            raise ValueError("Choose a picture first.")
        image, mask = edited["background"], _mask(edited)
        if not mask.any():
            raise ValueError("Paint over the part that is to be drawn anew first.")
        common, files = common_of(*values), (masks.png(image), masks.png(mask))
        return asking.inpaint(common, *files, strength, feather, refine=refine)

    def look(edited: Edited, feather: float) -> Any:
        if edited is None or edited["background"] is None:
            return None
        return masks.previewed(edited["background"], feathered(_mask(edited), int(feather)))

    inputs = [editor, strength, feather, refine, *chosen.inputs]
    panel.wire(desks, blocks, here, [draw.click, prompt.submit], inputs, wishes)
    gr.on([editor.change, feather.release], look, [editor, feather], seen, trigger_mode="always_last", **_QUIET)
    return Inpaint(editor, here, below)


def _editor() -> gr.ImageEditor:
    """The picture, and a brush to paint over it; undo is the editor's own."""
    return gr.ImageEditor(
        label="Picture and mask",
        type="numpy",
        image_mode="RGBA",
        format="png",
        sources=["upload", "clipboard"],
        transforms=(),
        layers=False,
        brush=gr.Brush(default_size=32, colors=["#ffffff"], color_mode="fixed"),
        eraser=gr.Eraser(default_size=32),
        fixed_canvas=False,
        height=420,
        elem_id="sds-editor",
    )


def _mask(edited: dict[str, Any]) -> masks.Pixels:
    height, width = edited["background"].shape[:2]
    return masks.painted(edited["layers"], height, width)


def _background(edited: Edited) -> Image.Image | None:
    """The picture under what was painted."""
    return Image.fromarray(edited["background"]) if edited and edited["background"] is not None else None
