"""Puts the tabs together into one application at `/ui`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI

from stable_diffusion_server.ui import asking
from stable_diffusion_server.ui.desks import Desks
from stable_diffusion_server.ui.tabs import create, history, inpaint, restyle, status, ways
from stable_diffusion_server.ui.tabs.panel import desk_of

_STYLE = Path(__file__).with_name("studio.css")
_HOUR, _DAY = 3600, 86_400
_FONTS = ["system-ui", "sans-serif"]


def build(desks: Desks, max_upload_bytes: int) -> FastAPI:
    """The studio. Takes seconds, as Gradio does."""
    with gr.Blocks(title="Studio", analytics_enabled=False, delete_cache=(_HOUR, _DAY)) as blocks:
        gr.Markdown("# Studio", elem_classes="sds-title")
        creating = _tabs(desks, blocks)

        async def look(request: gr.Request) -> tuple[Any, Any]:
            told = await desk_of(desks, request).readiness()
            folders = [str(model.get("folder", "")) for model in told.get("models", ())]
            prompts = asking.prompts_for(folders)
            known = asking.EMBEDDED_WORDS if prompts is asking.EMBEDDED_PROMPTS else ""
            return gr.Dataset(samples=[[text] for text in prompts]), gr.Markdown(known)

        blocks.load(look, None, [creating.examples, creating.words], show_progress="hidden", api_visibility="private")
    blocks.queue(default_concurrency_limit=None, api_open=False)
    shell = FastAPI(openapi_url=None)
    gr.mount_gradio_app(
        shell,
        blocks,
        path="/ui",
        footer_links=[],
        run_history=False,
        max_file_size=max_upload_bytes,
        show_error=False,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=gr.themes.Default(font=_FONTS, font_mono=["ui-monospace", "monospace"]),
        css=_STYLE.read_text(encoding="utf-8"),
    )
    return shell


def _tabs(desks: Desks, blocks: gr.Blocks) -> create.Create:
    """All tabs, and the ways between them."""
    with gr.Tabs() as tabs:
        with gr.Tab("Create", id="create"):
            creating = create.tab(desks, blocks)
        with gr.Tab("Restyle", id="restyle"):
            restyling = restyle.tab(desks, blocks)
        with gr.Tab("Inpaint", id="inpaint"):
            painting = inpaint.tab(desks, blocks)
        with gr.Tab("History", id="history") as past:
            kept = history.tab(desks, past)
        with gr.Tab("Status", id="status") as state:
            status.tab(desks, state)
    to = {"restyle": ("Restyle this one", restyling.image), "inpaint": ("Inpaint this one", painting.editor)}
    for drawing in (creating, restyling, painting):
        with drawing.below:
            ways.onward(desks, drawing.panel.shown, drawing.panel.chosen, drawing.panel.told, tabs, to)
    with kept.below:
        ways.onward(desks, kept.shown, kept.chosen, kept.told, tabs, to)
    return creating
