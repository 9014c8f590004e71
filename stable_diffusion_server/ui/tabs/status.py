"""The tab that shows the state of the server."""

from __future__ import annotations

from typing import Any

import gradio as gr

from stable_diffusion_server.ui.client import ApiClients, RefusedError
from stable_diffusion_server.ui.html import progress
from stable_diffusion_server.ui.html import status as status_html
from stable_diffusion_server.ui.tabs.controls import QUIET
from stable_diffusion_server.ui.tabs.results_panel import client_for

_SECONDS = 3


def tab(clients: ApiClients, tabs: gr.Tabs, opened: gr.Tab) -> None:
    """Build the tab. It refreshes every few seconds while it is open."""
    message = gr.HTML()
    clock = gr.Timer(_SECONDS, active=False)

    async def status(request: gr.Request) -> str:
        client = client_for(clients, request)
        try:
            return status_html.page(await client.readiness(), await client.figures(), await client.jobs())
        except RefusedError as error:
            return progress.alert(error.detail)

    def wind(event: gr.SelectData) -> Any:
        return gr.Timer(active=event.value == opened.label)

    gr.on([opened.select, clock.tick], status, None, message, **QUIET)
    tabs.select(wind, None, clock, **QUIET)
