"""Puts the tabs together into one application at `/ui`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr
import structlog
from fastapi import FastAPI
from limits import RateLimitItem
from starlette.types import Scope

from stable_diffusion_server.ui import model_options
from stable_diffusion_server.ui.client import RefusedError
from stable_diffusion_server.ui.client_factory import ApiClients
from stable_diffusion_server.ui.gradio_events import events_of
from stable_diffusion_server.ui.gradio_guard import GradioGuard
from stable_diffusion_server.ui.image_intake import ImageIntake
from stable_diffusion_server.ui.tabs import create, history, img2img, inpaint, status
from stable_diffusion_server.ui.tabs import theme as look
from stable_diffusion_server.ui.tabs.controls import QUIET, defaults_of
from stable_diffusion_server.ui.tabs.navigation import Navigation, onward
from stable_diffusion_server.ui.tabs.results_panel import ResultsPanel, client_for

_log = structlog.get_logger(__name__)

_STYLE, _SCRIPT = (Path(__file__).with_name(f"studio.{kind}") for kind in ("css", "js"))
_HOUR, _DAY = 3600, 86_400
# Pages whose state is kept; the longest unused go first.
_SESSIONS = 1000


class Studio(gr.Blocks):
    """Gradio's blocks, whose events tell of what failed in a line of our log."""

    async def process_api(self, *given: Any, **named: Any) -> dict[str, Any]:
        """Run an event. Raises Gradio's error for whatever is raised, told already, and in words of ours."""
        try:
            return await super().process_api(*given, **named)
        except gr.Error as error:  # a value that a component does not take, which Gradio's sentence repeats
            _log.warning("an event of the UI was refused", reason=type(error).__name__)
        except Exception as error:
            _log.error("an event of the UI failed", exc_info=error)
        raise gr.Error("This cannot be done; load the page again.", print_exception=False)


def build(desks: ApiClients, intake: ImageIntake, rate: RateLimitItem | None) -> FastAPI:
    """The studio behind its guard. Takes seconds, as Gradio does. `rate` is how many events one visitor may send."""
    with Studio(title="Studio", analytics_enabled=False, delete_cache=(_HOUR, _DAY)) as blocks:
        gr.Markdown("# Studio", elem_classes="sds-title")
        creating, panels, kept = _tabs(desks, intake, blocks)
        _offer(desks, blocks, creating, panels, kept)
    blocks.state_session_capacity = _SESSIONS
    blocks.queue(default_concurrency_limit=None, api_open=False)
    shell = FastAPI(openapi_url=None)
    gr.mount_gradio_app(
        shell,
        blocks,
        path="/ui",
        footer_links=[],
        run_history=False,
        # No file comes in by Gradio, and none goes out: these hold should the guard ever let one through.
        allowed_paths=[],
        blocked_paths=[Path.cwd().anchor],
        max_file_size=1,
        show_error=False,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=look.theme(),
        css=_STYLE.read_text(encoding="utf-8"),
        js=_SCRIPT.read_text(encoding="utf-8"),
    )
    # Without it Gradio checks no path at all that a page names.
    blocks.has_launched = True
    shell.add_middleware(GradioGuard, events=events_of(blocks.config), owner=_owner, rate=rate)
    return shell


def _owner(scope: Scope) -> str:
    """Whose request this is, as the entrance found."""
    owner: str = scope["state"]["owner"]
    return owner


def _tabs(
    desks: ApiClients, intake: ImageIntake, blocks: gr.Blocks
) -> tuple[create.CreateTab, list[ResultsPanel], history.HistoryTab]:
    """All tabs, and the ways between them."""
    with gr.Tabs() as tabs:
        with gr.Tab("Create", id="create"):
            creating = create.tab(desks, blocks)
        with gr.Tab("Restyle", id="restyle"):
            restyling = img2img.tab(desks, intake, blocks)
        with gr.Tab("Inpaint", id="inpaint"):
            painting = inpaint.tab(desks, intake, blocks)
        with gr.Tab("History", id="history") as past:
            kept = history.tab(desks, past)
        with gr.Tab("Status", id="status") as state:
            status.tab(desks, tabs, state)
    to = {"restyle": ("Restyle this one", restyling.image), "inpaint": ("Inpaint this one", painting.editor)}
    ways = Navigation(tabs, creating, to)
    panels = [creating.panel, restyling.panel, painting.panel]
    for panel in panels:
        with panel.results:
            onward(desks, intake, panel.shown, panel.chosen, panel.told, ways)
    with kept.below:
        onward(desks, intake, kept.shown, kept.chosen, kept.told, ways)
    return creating, panels, kept


def _offer(
    desks: ApiClients,
    blocks: gr.Blocks,
    creating: create.CreateTab,
    panels: list[ResultsPanel],
    kept: history.HistoryTab,
) -> None:
    """Have the fields show what the server has to offer, when a page is opened and when a model is chosen."""
    models = gr.State([])
    outputs = [models, creating.examples, creating.words, *creating.size, kept.model]
    for panel in panels:
        outputs += [panel.fields.model, *panel.fields.habits]

    async def offer(request: gr.Request) -> tuple[Any, ...]:
        try:
            told = (await client_for(desks, request).readiness()).get("models", [])
        except RefusedError:
            told = []
        side = model_options.side(model_options.chosen(told, ""))
        names = [history.EVERY, *((name, name) for name in model_options.names(told))]
        habits = (gr.Dropdown(choices=model_options.choices(told), value=""), *defaults_of(told, ""))
        return (
            told,
            gr.Dataset(samples=[[text] for text in model_options.prompts(told)]),
            gr.Markdown(model_options.words(told)),
            *(f"{side}x{side}", side, side),
            gr.Dropdown(choices=names, value=""),
            *habits * len(panels),
        )

    blocks.load(offer, None, outputs, **QUIET)
    for panel in panels:
        fields = panel.fields
        fields.model.change(defaults_of, [models, fields.model], fields.habits, **QUIET)
