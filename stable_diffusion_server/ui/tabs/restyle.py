"""The tab that draws a picture anew, by its edges if wanted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from stable_diffusion_server.ui import asking, masks
from stable_diffusion_server.ui.desk import Wish
from stable_diffusion_server.ui.desks import Desks
from stable_diffusion_server.ui.tabs import panel, ways
from stable_diffusion_server.ui.tabs.fields import common_of, fields, prompt_box

_QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}


@dataclass(frozen=True, slots=True)
class Restyle:
    """What others touch: the picture to start from, and the panel."""

    image: gr.Image
    panel: panel.Panel
    below: gr.Column


def tab(desks: Desks, blocks: gr.Blocks) -> Restyle:
    """Lay the tab out here."""
    with gr.Row():
        with gr.Column(min_width=300):
            image = gr.Image(
                label="Picture", type="filepath", format="png", sources=["upload", "clipboard", "webcam"], height=320
            )
            prompt = prompt_box("What should it become?")
            draw, cancel = panel.buttons()
            strength = gr.Slider(0, 1, 0.6, step=0.01, label="Strength", info="0 keeps the picture, 1 draws it anew.")
            edges = _edges(image)
            chosen = fields(prompt)
        with gr.Column(min_width=300):
            here = panel.panel("restyle", draw, cancel, chosen.seed)
            ways.compare(desks, here, image, lambda path: Image.open(path) if path else None)
            below = gr.Column()

    def wishes(path: str | None, strength: float, canny: bool, low: float, high: float, *values: Any) -> list[Wish]:
        if path is None:
            raise ValueError("Choose a picture to start from first.")
        return asking.restyle(common_of(*values), Path(path).read_bytes(), strength, canny=canny, low=low, high=high)

    panel.wire(desks, blocks, here, [draw.click, prompt.submit], [image, strength, *edges, *chosen.inputs], wishes)
    return Restyle(image, here, below)


def _edges(image: gr.Image) -> tuple[gr.Checkbox, gr.Slider, gr.Slider]:
    """Whether edges are kept, which ones, and how they look."""
    canny = gr.Checkbox(label="Keep the edges (canny)")
    with gr.Column(visible=False) as more:
        low = gr.Slider(0, 1000, 100, step=1, label="What touches an edge counts from")
        high = gr.Slider(0, 1000, 200, step=1, label="An edge counts from")
        seen = gr.Image(label="Edges", interactive=False, height=240, format="png", buttons=[])

    def look(path: str | None, canny: bool, low: float, high: float) -> Any:
        return masks.edges(Path(path), int(low), int(high)) if path and canny else None

    canny.input(lambda canny: gr.Column(visible=canny), canny, more, **_QUIET)
    gr.on(
        [image.change, canny.input, low.release, high.release],
        look,
        [image, canny, low, high],
        seen,
        trigger_mode="always_last",
        **_QUIET,
    )
    return canny, low, high
