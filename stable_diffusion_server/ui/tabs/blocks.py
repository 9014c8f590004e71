"""Builds the Gradio application at `/ui` from its tabs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import structlog
from fastapi import FastAPI
from limits import RateLimitItem
from starlette.types import Scope

from stable_diffusion_server.ui import model_options
from stable_diffusion_server.ui.client import ApiClients, RefusedError
from stable_diffusion_server.ui.gradio_events import GradioGuard, events_of
from stable_diffusion_server.ui.html import progress
from stable_diffusion_server.ui.html import status as status_html
from stable_diffusion_server.ui.image_intake import ImageIntake
from stable_diffusion_server.ui.tabs import control_units, create, edit, history, img2img, inpaint, theme, upscale
from stable_diffusion_server.ui.tabs.controls import QUIET, defaults_of
from stable_diffusion_server.ui.tabs.navigation import Navigation, onward
from stable_diffusion_server.ui.tabs.results_panel import ResultsPanel, client_for

_log = structlog.get_logger(__name__)

_STYLE, _SCRIPT = (Path(__file__).with_name(f"studio.{kind}") for kind in ("css", "js"))
_HOUR, _DAY = 3600, 86_400
# Maximum number of pages whose state Gradio keeps; it drops the least recently used first.
_SESSIONS = 1000
_STATUS_REFRESH_SECONDS = 3


class Studio(gr.Blocks):
    """Gradio Blocks that log failed events and show a neutral error."""

    async def process_api(self, *given: Any, **named: Any) -> dict[str, Any]:
        """Run an event. Logs any exception, and raises Gradio's error with a neutral text instead."""
        try:
            return await super().process_api(*given, **named)
        except gr.Error as error:  # a component refused a value; Gradio's text would quote the value
            _log.warning("an event of the UI was refused", reason=type(error).__name__)
        except Exception as error:
            _log.error("an event of the UI failed", exc_info=error)
        raise gr.Error("This cannot be done; load the page again.", print_exception=False)


def build(clients: ApiClients, intake: ImageIntake, rate: RateLimitItem | None) -> FastAPI:
    """Build the UI behind `GradioGuard`, which takes seconds. `rate` limits the events of one visitor."""
    with Studio(title="Studio", analytics_enabled=False, delete_cache=(_HOUR, _DAY)) as blocks:
        gr.Markdown("# Studio", elem_classes="sds-title")
        built = _tabs(clients, intake, blocks)
        _load_options(clients, blocks, built)
    blocks.state_session_capacity = _SESSIONS
    blocks.queue(default_concurrency_limit=None, api_open=False)
    shell = FastAPI(openapi_url=None)
    gr.mount_gradio_app(
        shell,
        blocks,
        path="/ui",
        footer_links=[],
        run_history=False,
        # The guard blocks file transfers through Gradio; these limits are a second defence.
        allowed_paths=[],
        blocked_paths=[Path.cwd().anchor],
        max_file_size=1,
        show_error=False,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=theme.theme(),
        css=_STYLE.read_text(encoding="utf-8"),
        js=_SCRIPT.read_text(encoding="utf-8"),
    )
    # Otherwise Gradio does not check the file paths that a page sends.
    blocks.has_launched = True
    shell.add_middleware(GradioGuard, events=events_of(blocks.config), owner=_owner, rate=rate)
    return shell


def _owner(scope: Scope) -> str:
    """Return the visitor's name from the scope; `LazyUiApp` sets it."""
    owner: str = scope["state"]["owner"]
    return owner


@dataclass(frozen=True, slots=True)
class _Tabs:
    """The tabs whose fields show what the server's models have; `panels` are those that draw with any of them."""

    creating: create.CreateTab
    editing: edit.EditTab
    panels: list[ResultsPanel]
    past: history.HistoryTab
    guides: list[control_units.UnitControls]


def _tabs(clients: ApiClients, intake: ImageIntake, blocks: gr.Blocks) -> _Tabs:
    """Build all tabs and the navigation between them."""
    with gr.Tabs() as tabs:
        with gr.Tab("Create", id="create"):
            creating = create.tab(clients, intake, blocks)
        with gr.Tab("Restyle", id="restyle"):
            restyling = img2img.tab(clients, intake, blocks)
        with gr.Tab("Inpaint", id="inpaint"):
            painting = inpaint.tab(clients, intake, blocks)
        with gr.Tab("Edit", id="edit"):
            editing = edit.tab(clients, intake, blocks)
        with gr.Tab("Upscale", id="upscale"):
            upscale.tab(clients, intake)
        with gr.Tab("History", id="history") as history_tab:
            past = history.tab(clients, history_tab)
        with gr.Tab("Status", id="status") as state:
            _status_tab(clients, tabs, state)
    to = {
        "restyle": ("Restyle this one", restyling.image),
        "inpaint": ("Inpaint this one", painting.editor),
        "edit": ("Edit this one", editing.references),
    }
    ways = Navigation(tabs, creating, to, lists=("edit",))
    panels = [creating.panel, restyling.panel, painting.panel]
    for panel in [*panels, editing.panel]:
        with panel.results:
            onward(clients, intake, panel.shown, panel.chosen, panel.message, ways)
    with past.below:
        onward(clients, intake, past.shown, past.chosen, past.message, ways)
    return _Tabs(creating, editing, panels, past, [creating.guides, restyling.guides])


def _load_options(clients: ApiClients, blocks: gr.Blocks, built: _Tabs) -> None:
    """Fill the fields with the server's models when a page opens, and with defaults when a model is chosen."""
    models = gr.State([])
    creating, editing = built.creating, built.editing
    outputs = [models, creating.examples, creating.words, *creating.size, built.past.model, *editing.of_models]
    for panel in built.panels:
        outputs += [panel.fields.model, *panel.fields.model_defaults]

    async def load(request: gr.Request) -> tuple[Any, ...]:
        try:
            available = (await client_for(clients, request).readiness()).get("models", [])
        except RefusedError:
            available = []
        side = model_options.side(model_options.chosen(available, ""))
        names = [history.EVERY, *((name, name) for name in model_options.names(available))]
        defaults = (gr.Dropdown(choices=model_options.choices(available), value=""), *defaults_of(available, ""))
        return (
            available,
            gr.Dataset(samples=[[text] for text in model_options.prompts(available)]),
            gr.Markdown(model_options.words(available)),
            *(f"{side}x{side}", side, side),
            gr.Dropdown(choices=names, value=""),
            *edit.options_of(available),
            *defaults * len(built.panels),
        )

    blocks.load(load, None, outputs, **QUIET)
    _load_control_lists(clients, blocks, built.guides)
    editing.panel.fields.model.change(edit.takes_of, [models, editing.panel.fields.model], editing.takes, **QUIET)
    for panel in [*built.panels, editing.panel]:
        fields = panel.fields
        fields.model.change(defaults_of, [models, fields.model], fields.model_defaults, **QUIET)


def _load_control_lists(clients: ApiClients, blocks: gr.Blocks, guides: list[control_units.UnitControls]) -> None:
    """Fill the lists of ControlNets and of preprocessors when a page opens."""
    outputs = [field for made in guides for field in (*made.models, *made.preprocessors)]

    async def load(request: gr.Request) -> list[Any]:
        models, modules = await control_units.choices_of(clients, request)
        return [field for made in guides for field in (*[models] * len(made.models), *[modules] * len(made.models))]

    blocks.load(load, None, outputs, **QUIET)


def _status_tab(clients: ApiClients, tabs: gr.Tabs, opened: gr.Tab) -> None:
    """Build the status tab. It refreshes every few seconds while it is open."""
    message = gr.HTML()
    clock = gr.Timer(_STATUS_REFRESH_SECONDS, active=False)

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
