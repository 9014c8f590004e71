"""Buttons that compare an image with its source and send it to another tab."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import gradio as gr

from stable_diffusion_server.errors import ServerError
from stable_diffusion_server.ui import model_options
from stable_diffusion_server.ui.client import ApiClients, RefusedError
from stable_diffusion_server.ui.forms import MOST_REFERENCES
from stable_diffusion_server.ui.html import details, progress
from stable_diffusion_server.ui.image_intake import ImageIntake
from stable_diffusion_server.ui.tabs.controls import QUIET, references_of, tokens_of
from stable_diffusion_server.ui.tabs.create import CreateTab
from stable_diffusion_server.ui.tabs.results_panel import ResultsPanel, client_for, owner_of


@dataclass(frozen=True, slots=True)
class Navigation:
    """Targets of the buttons: the tabs, Create with its fields, and label and component to fill by tab id.

    The component of a tab in `lists` keeps the images that it has and takes one more.
    """

    tabs: gr.Tabs
    create: CreateTab
    to: Mapping[str, tuple[str, gr.HTML]]
    lists: Collection[str] = ()


def compare(here: ResultsPanel, beside: gr.HTML, before: gr.HTML) -> None:
    """Show the chosen image beside its source."""

    def both(shown: list[Any], chosen: int, value: str | None) -> str:
        picture, _ = tokens_of(value)
        if not picture or chosen >= len(shown):
            return ""
        return progress.before_and_after(f"pictures/{picture}", str(shown[chosen]["path"]))

    gr.on([here.shown.change, here.chosen.change], both, [here.shown, here.chosen, before], beside, **QUIET)


def onward(
    clients: ApiClients, intake: ImageIntake, shown: gr.State, chosen: gr.State, message: gr.HTML, ways: Navigation
) -> None:
    """Add buttons that send the chosen image to other tabs, and its settings to Create."""

    def button(tab: str, label: str, target: gr.HTML) -> None:
        async def send(request: gr.Request, shown: list[Any], chosen: int, value: str | None) -> tuple[Any, Any, Any]:
            kept = references_of(value) if tab in ways.lists else ()
            if not 0 <= chosen < len(shown):
                return gr.skip(), gr.skip(), progress.alert("There is no picture to take along yet.")
            if len(kept) >= MOST_REFERENCES:
                return gr.skip(), gr.skip(), progress.alert(f"There are {len(kept)} pictures already.")
            try:
                owner = owner_of(clients, request)
                with intake.place(owner):
                    taken = await intake.take(owner, await client_for(clients, request).picture(shown[chosen]["path"]))
            except (RefusedError, ServerError) as error:
                return gr.skip(), gr.skip(), progress.alert(error.detail)
            return " ".join([*kept, taken.token]), gr.Tabs(selected=tab), gr.skip()

        taking = [shown, chosen, target]
        gr.Button(label, size="sm", min_width=90).click(send, taking, [target, ways.tabs, message], **QUIET)

    with gr.Row():
        for tab, (label, target) in ways.to.items():
            button(tab, label, target)
        again = gr.Button("Use its settings", size="sm", min_width=90)
    _back(clients, again, (shown, chosen, message), ways)


def _back(clients: ApiClients, again: gr.Button, at: tuple[Any, ...], ways: Navigation) -> None:
    """Connect a button that fills Create's fields with the parameters of the chosen image."""
    shown, chosen, message = at
    fields = ways.create.panel.fields
    targets = [fields.prompt, fields.model, fields.negative, fields.steps, fields.guidance, fields.seed, fields.keep]
    outputs = [*targets, *ways.create.size, ways.tabs, message]

    async def use(request: gr.Request, shown: list[Any], chosen: int) -> tuple[Any, ...]:
        nothing = (gr.skip(),) * (len(outputs) - 1)
        if not 0 <= chosen < len(shown):
            return *nothing, progress.alert("There is no picture to take settings from yet.")
        try:
            record = (await client_for(clients, request).record(shown[chosen]["key"]))["record"]
        except RefusedError as error:
            return *nothing, progress.alert(error.detail)
        was = details.settings(record)
        texts = [was[name] for name in ("prompt", "model", "negative", "steps", "guidance", "seed")]
        size = model_options.preset(was["width"], was["height"]), was["width"], was["height"]
        return *texts, True, *size, gr.Tabs(selected="create"), gr.skip()

    again.click(use, [shown, chosen], outputs, **QUIET)
