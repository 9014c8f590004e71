"""The routes of AUTOMATIC1111's Gradio page that clients ask: `/config`, `/user` and `/app_id`.

Some clients read lists from the page's components by their `elem_id`, because older versions of the API lack them.
"""

from __future__ import annotations

from secrets import randbits

from fastapi import APIRouter, Request, Response
from starlette.concurrency import run_in_threadpool
from typing_extensions import TypedDict  # pydantic rejects typing.TypedDict before Python 3.12

from stable_diffusion_server.api.automatic1111.checkpoint_names import title_of
from stable_diffusion_server.api.automatic1111.controlnet_routes import module_names
from stable_diffusion_server.api.automatic1111.sampler_names import samplers_of
from stable_diffusion_server.api.dependencies import DialectContext, caller_of
from stable_diffusion_server.api.http_responses import JSONResponse
from stable_diffusion_server.api.schemas.responses import described
from stable_diffusion_server.concurrency import FairRequestQueue

_CONCURRENCY, _MAX_PER_CALLER = 4, 64
# The version of Gradio that AUTOMATIC1111 1.10 uses; clients read the shape of the components by it.
_GRADIO_VERSION = "3.41.2"
_MODELS_ID, _UNITS_ID = "setting_sd_model_checkpoint", "setting_control_net_max_models_num"
_DETECTORS_ID = "txt2img_controlnet_ControlNet-0_controlnet_preprocessor_dropdown"


class GradioComponentBody(TypedDict):
    """A component of the page."""

    id: int
    type: str
    props: dict[str, object]


class GradioConfigBody(TypedDict):
    """The page's components; it has no events."""

    version: str
    mode: str
    app_id: int
    title: str
    components: list[GradioComponentBody]
    dependencies: list[dict[str, object]]


class GradioAppIdBody(TypedDict):
    """A number that is new at each start of the server."""

    app_id: int


def add_gradio_routes(routes: APIRouter, context: DialectContext) -> None:
    """Add the routes of the page."""
    app_id = randbits(53)
    queue = FairRequestQueue(_CONCURRENCY, _MAX_PER_CALLER, f"{_MAX_PER_CALLER} requests of yours wait already.")

    def body(own: DialectContext) -> GradioConfigBody:
        return {
            "version": _GRADIO_VERSION,
            "mode": "blocks",
            "app_id": app_id,
            "title": "Stable Diffusion",
            "components": _components(own),
            "dependencies": [],
        }

    @routes.get(
        "/config",
        summary="AUTOMATIC1111's page: components",
        operation_id="gradio_config",
        response_model=None,
        responses={200: {"model": described(GradioConfigBody)}},
    )
    async def config(request: Request) -> Response:
        """Return the lists of models, samplers, upscalers and LoRAs as components of a page."""
        caller = caller_of(request)
        async with queue.hold(caller.share):
            # It scans the LoRA folder.
            return JSONResponse(await run_in_threadpool(body, context.for_caller(caller)))

    @routes.get("/user", summary="AUTOMATIC1111's page: user", operation_id="gradio_user", response_model=None)
    async def user(request: Request) -> Response:
        """Return the name of the caller's API key, null without one."""
        return JSONResponse(caller_of(request).name or None)

    @routes.get(
        "/app_id",
        summary="AUTOMATIC1111's page: id of its start",
        operation_id="gradio_app_id",
        response_model=None,
        responses={200: {"model": described(GradioAppIdBody)}},
    )
    async def get_app_id(request: Request) -> Response:
        """Return a number that is new at each start of the server."""
        return JSONResponse({"app_id": app_id})


def _components(context: DialectContext) -> list[GradioComponentBody]:
    upscalers = ["None", *context.upscaler.factors()]
    lists = {
        _MODELS_ID: [title_of(spec) for spec in context.models.values()],
        "txt2img_sampling": samplers_of(context.models),
        "img2img_sampling": samplers_of(context.models),
        "txt2img_hr_upscaler": upscalers,
        "extras_upscaler_1": upscalers,
        "extras_upscaler_2": upscalers,
        "setting_sd_vae": ["Automatic", "None"],
        "setting_sd_hypernetwork": ["None"],
        "setting_sd_lora": ["None", *sorted(context.loras())],
    }
    found: list[GradioComponentBody] = [
        {"id": number, "type": "dropdown", "props": {"elem_id": name, "choices": choices, "visible": True}}
        for number, (name, choices) in enumerate(lists.items(), 1)
    ]
    most = context.limits.max_controls
    units = {"elem_id": _UNITS_ID, "value": most, "minimum": 1, "maximum": most, "step": 1, "visible": True}
    detectors = {"elem_id": _DETECTORS_ID, "label": "Preprocessor", "choices": module_names(context), "visible": True}
    number = len(found) + 1
    return [
        *found,
        {"id": number, "type": "slider", "props": dict(units)},
        {"id": number + 1, "type": "dropdown", "props": dict(detectors)},
    ]
