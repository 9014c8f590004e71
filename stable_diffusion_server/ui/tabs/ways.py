"""Ways on from a picture: beside the one it came from, and into another tab."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import gradio as gr
from PIL import Image

from stable_diffusion_server.ui import masks, offering, recounting, telling
from stable_diffusion_server.ui.desk import RefusedError
from stable_diffusion_server.ui.desks import Desks
from stable_diffusion_server.ui.tabs.create import Create
from stable_diffusion_server.ui.tabs.fields import QUIET
from stable_diffusion_server.ui.tabs.panel import Panel, desk_of


@dataclass(frozen=True, slots=True)
class Ways:
    """Where ways lead: the tabs, Create with its fields, and by a tab's id a label and the component to fill."""

    tabs: gr.Tabs
    create: Create
    to: Mapping[str, tuple[str, Any]]


def comparison() -> gr.ImageSlider:
    """Where a picture and what it was made from are seen in one."""
    return gr.ImageSlider(label="Before and after", type="filepath", interactive=False, format="png", buttons=[])


def compare(
    desks: Desks, here: Panel, slider: gr.ImageSlider, before: Any, opened: Callable[[Any], Image.Image | None]
) -> None:
    """Show the chosen picture beside what it was made from, which `opened` makes of the value of `before`."""

    async def beside(request: gr.Request, shown: list[Any], chosen: int, value: Any) -> Any:
        first = opened(value)
        if first is None or chosen >= len(shown):
            return None
        try:
            second = masks.opened(await desk_of(desks, request).picture(shown[chosen]["path"]))
        except RefusedError:
            return None
        return first.convert("RGB").resize(second.size), second

    gr.on([here.shown.change, here.chosen.change], beside, [here.shown, here.chosen, before], slider, **QUIET)


def onward(desks: Desks, shown: gr.State, chosen: gr.State, told: gr.HTML, ways: Ways) -> None:
    """Buttons that take the chosen picture to other tabs, and its settings to Create."""

    def button(tab: str, label: str, target: Any) -> None:
        async def send(request: gr.Request, shown: list[Any], chosen: int) -> tuple[Any, Any, Any]:
            if not 0 <= chosen < len(shown):
                return gr.skip(), gr.skip(), telling.alert("There is no picture to take along yet.")
            try:
                file = await desk_of(desks, request).picture(shown[chosen]["path"])
            except RefusedError as error:
                return gr.skip(), gr.skip(), telling.alert(error.detail)
            picture = await asyncio.to_thread(masks.opened, file)
            edited = isinstance(target, gr.ImageEditor)
            value = {"background": picture, "layers": [], "composite": None} if edited else picture
            return value, gr.Tabs(selected=tab), gr.skip()

        gr.Button(label, size="sm", min_width=90).click(send, [shown, chosen], [target, ways.tabs, told], **QUIET)

    with gr.Row():
        for tab, (label, target) in ways.to.items():
            button(tab, label, target)
        again = gr.Button("Use its settings", size="sm", min_width=90)
    _back(desks, again, (shown, chosen, told), ways)


def _back(desks: Desks, again: gr.Button, at: tuple[Any, ...], ways: Ways) -> None:
    """Have a button fill Create's fields with what would draw the chosen picture again."""
    shown, chosen, told = at
    fields = ways.create.panel.fields
    targets = [fields.prompt, fields.model, fields.negative, fields.steps, fields.guidance, fields.seed, fields.keep]
    outputs = [*targets, *ways.create.size, ways.tabs, told]

    async def use(request: gr.Request, shown: list[Any], chosen: int) -> tuple[Any, ...]:
        nothing = (gr.skip(),) * (len(outputs) - 1)
        if not 0 <= chosen < len(shown):
            return *nothing, telling.alert("There is no picture to take settings from yet.")
        try:
            record = (await desk_of(desks, request).record(shown[chosen]["key"]))["record"]
        except RefusedError as error:
            return *nothing, telling.alert(error.detail)
        was = recounting.settings(record)
        texts = [was[name] for name in ("prompt", "model", "negative", "steps", "guidance", "seed")]
        size = offering.preset(was["width"], was["height"]), was["width"], was["height"]
        return *texts, True, *size, gr.Tabs(selected="create"), gr.skip()

    again.click(use, [shown, chosen], outputs, **QUIET)
