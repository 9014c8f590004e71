"""The tab that tells how the server stands."""

from __future__ import annotations

from typing import Any

import gradio as gr

from stable_diffusion_server.ui import standing, telling
from stable_diffusion_server.ui.desk import RefusedError
from stable_diffusion_server.ui.desks import Desks
from stable_diffusion_server.ui.tabs.panel import desk_of


def tab(desks: Desks, opened: gr.Tab) -> None:
    """Lay the tab out here."""
    told = gr.HTML()
    look = gr.Button("Look again", size="sm")

    async def status(request: gr.Request) -> str:
        desk = desk_of(desks, request)
        try:
            return standing.page(await desk.readiness(), await desk.figures(), await desk.jobs())
        except RefusedError as error:
            return telling.alert(error.detail)

    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    gr.on([opened.select, look.click], status, None, told, **quiet)
