"""Ways on from a picture: beside the one it came from, and into another tab."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

import gradio as gr
from PIL import Image

from stable_diffusion_server.ui import masks, telling
from stable_diffusion_server.ui.desk import RefusedError
from stable_diffusion_server.ui.desks import Desks
from stable_diffusion_server.ui.tabs.panel import Panel, desk_of

_QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}


def compare(desks: Desks, here: Panel, before: Any, opened: Callable[[Any], Image.Image | None]) -> None:
    """Show the chosen picture beside what it was made from, which `opened` makes of the value of `before`."""
    slider = gr.ImageSlider(label="Before and after", type="filepath", interactive=False, format="png", buttons=[])

    async def beside(request: gr.Request, shown: list[Any], chosen: int, value: Any) -> Any:
        first = opened(value)
        if first is None or chosen >= len(shown):
            return None
        try:
            second = masks.opened(await desk_of(desks, request).picture(shown[chosen]["path"]))
        except RefusedError:
            return None
        return first.convert("RGB").resize(second.size), second

    gr.on([here.shown.change, here.chosen.change], beside, [here.shown, here.chosen, before], slider, **_QUIET)


def onward(
    desks: Desks, shown: gr.State, chosen: gr.State, told: gr.HTML, tabs: gr.Tabs, to: Mapping[str, tuple[str, Any]]
) -> None:
    """Buttons that take the chosen picture to other tabs: by the tab's id, its label and the component to fill."""

    def button(tab: str, label: str, target: Any) -> None:
        async def send(request: gr.Request, shown: list[Any], chosen: int) -> tuple[Any, Any, Any]:
            if chosen >= len(shown):
                return gr.skip(), gr.skip(), telling.alert("There is no picture to take along yet.")
            try:
                file = await desk_of(desks, request).picture(shown[chosen]["path"])
            except RefusedError as error:
                return gr.skip(), gr.skip(), telling.alert(error.detail)
            picture = await asyncio.to_thread(masks.opened, file)
            edited = isinstance(target, gr.ImageEditor)
            value = {"background": picture, "layers": [], "composite": None} if edited else picture
            return value, gr.Tabs(selected=tab), gr.skip()

        gr.Button(label, size="sm", min_width=90).click(send, [shown, chosen], [target, tabs, told], **_QUIET)

    with gr.Row():
        for tab, (label, target) in to.items():
            button(tab, label, target)
