"""The tab that tells how the server stands."""

from __future__ import annotations

from typing import Any

import gradio as gr

from stable_diffusion_server.ui.client import RefusedError
from stable_diffusion_server.ui.client_factory import ApiClients
from stable_diffusion_server.ui.html import progress
from stable_diffusion_server.ui.html import status as standing
from stable_diffusion_server.ui.tabs.controls import QUIET
from stable_diffusion_server.ui.tabs.results_panel import client_for

_SECONDS = 3


def tab(desks: ApiClients, tabs: gr.Tabs, opened: gr.Tab) -> None:
    """Lay the tab out here. It is told anew every few seconds, as long as it is looked at."""
    told = gr.HTML()
    clock = gr.Timer(_SECONDS, active=False)

    async def status(request: gr.Request) -> str:
        desk = client_for(desks, request)
        try:
            return standing.page(await desk.readiness(), await desk.figures(), await desk.jobs())
        except RefusedError as error:
            return progress.alert(error.detail)

    def wind(event: gr.SelectData) -> Any:
        return gr.Timer(active=event.value == opened.label)

    gr.on([opened.select, clock.tick], status, None, told, **QUIET)
    tabs.select(wind, None, clock, **QUIET)
