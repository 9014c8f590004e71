"""Routes of AUTOMATIC1111's ControlNet extension: its detectors and networks, and `detect`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool
from typing_extensions import TypedDict  # pydantic rejects typing.TypedDict before Python 3.12

from stable_diffusion_server.api.automatic1111.controlnet_names import (
    CONTROL_TYPES,
    INPAINT_MODULE,
    RESOLUTION_HIGH,
    RESOLUTION_LOW,
    USUAL_RESOLUTION,
    networks_of,
    numbers_of,
    resolution_of,
    row_of,
    shown_name,
)
from stable_diffusion_server.api.automatic1111.image_prompt_units import ADAPTER_MODULE, adapter_names
from stable_diffusion_server.api.automatic1111.image_work import ImageWorker, json_of, read_body
from stable_diffusion_server.api.base64_images import bytes_of, text_of
from stable_diffusion_server.api.concurrency import run_if_large
from stable_diffusion_server.api.dependencies import DialectContext, caller_of
from stable_diffusion_server.api.http_responses import JSONResponse
from stable_diffusion_server.api.openapi.document import coerced_properties, json_body
from stable_diffusion_server.api.schemas.responses import described
from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.generation import DEFAULT_QUALITY, NAME_MAX, ChosenPreprocessor, ImagePreprocessor
from stable_diffusion_server.imaging import (
    NO_PREPROCESSOR,
    RESOLUTION,
    Pixels,
    Preprocessor,
    PreprocessorOption,
    control_size,
    encode_image,
)
from stable_diffusion_server.types import ControlKind, Format

_API_VERSION = 2
_IMAGES_MAX = 32
_IMAGES, _OLDER_IMAGES, _MODULE = "controlnet_input_images", "controlnet_images", "controlnet_module"


class ControlNetVersionBody(TypedDict):
    """Version of the extension's API."""

    version: int


class ControlNetModelsBody(TypedDict):
    """Names of the ControlNets."""

    model_list: list[str]


class ControlNetModulesBody(TypedDict):
    """Names of the detectors, and their sliders by name."""

    module_list: list[str]
    module_detail: dict[str, object]


class ControlNetSettingsBody(TypedDict):
    """How many units a request may have."""

    control_net_unit_count: int


class ControlNetTypesBody(TypedDict):
    """Detectors and ControlNets by kind, with the default ones."""

    control_types: dict[str, object]


class ControlNetDetectBody(TypedDict):
    """Detected maps as PNG in base64."""

    images: list[str]
    info: str


class DetectParams(BaseModel):
    """Parameters of `detect`. Further ones are ignored."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    controlnet_module: str = Field(
        "none", max_length=NAME_MAX, description="A detector in `/controlnet/module_list`; `none`: the image itself."
    )
    controlnet_input_images: list[str] = Field([], max_length=_IMAGES_MAX, description="The images in base64.")
    controlnet_images: list[str] = Field([], max_length=_IMAGES_MAX, description=f"Older name of `{_IMAGES}`.")
    controlnet_processor_res: int = Field(-1, description="Shorter side in pixels, 64 to 2048; -1: 512.")
    controlnet_threshold_a: float = Field(-1, description="The detector's first number; -1: its default.")
    controlnet_threshold_b: float = Field(-1, description="The detector's second number; -1: its default.")

    def chosen(self, preprocessor: ImagePreprocessor) -> ChosenPreprocessor:
        """Return the detector with its numbers. Reads files; blocks. Raises `InvalidInput`."""
        row = row_of(self.controlnet_module, _MODULE)
        if row is None:
            return ChosenPreprocessor()
        options = numbers_of(row, (self.controlnet_threshold_a, self.controlnet_threshold_b))
        resolution = {} if row.keeps_size else {RESOLUTION: resolution_of(self.controlnet_processor_res)}
        return preprocessor.find(row.name, {**options, **resolution}, _MODULE)


def add_controlnet_routes(routes: APIRouter, worker: ImageWorker) -> None:
    """Add the routes of the extension."""
    bodies: tuple[tuple[str, Callable[[DialectContext], Any], type], ...] = (
        ("version", lambda context: {"version": _API_VERSION}, ControlNetVersionBody),
        ("model_list", lambda context: {"model_list": controlnet_names(context)}, ControlNetModelsBody),
        ("module_list", _modules_body, ControlNetModulesBody),
        ("settings", lambda context: {"control_net_unit_count": context.limits.max_controls}, ControlNetSettingsBody),
        ("control_types", _types_body, ControlNetTypesBody),
    )
    for name, body_of, schema in bodies:
        _add_list_route(routes, name, body_of, schema, worker.context)

    @routes.post(
        "/controlnet/detect",
        summary="ControlNet: make control images",
        operation_id="controlnet_detect",
        openapi_extra=json_body(coerced_properties(DetectParams, worker.context.limits), _IMAGES),
        response_model=None,
        responses={200: {"model": described(ControlNetDetectBody)}},
    )
    async def detect(request: Request) -> Response:
        """Return what a detector makes of images."""
        params = await read_body(request, DetectParams, frozenset({_IMAGES, _OLDER_IMAGES}))
        given = params.controlnet_input_images or params.controlnet_images
        chosen = await run_in_threadpool(params.chosen, worker.context.preprocessor)
        images = await _detected(request, worker, given, chosen)
        return await json_of({"images": images, "info": "Success"}, images)


async def _detected(
    request: Request, worker: ImageWorker, given: Sequence[str], chosen: ChosenPreprocessor
) -> list[str]:
    """Return the control images of images, both in base64. Raises `InvalidInput` and the errors of decoding."""
    if not given:
        raise InvalidInput(f"{_IMAGES} must hold an image in base64.", field=_IMAGES)
    share, total, resolution = caller_of(request).share, 0, chosen.values.get(RESOLUTION, 0.0)
    images: list[str] = []
    async with worker.queue.hold(share):
        for text in given:
            data = await run_if_large(len(text), bytes_of, text, _IMAGES)
            pixels = await worker.decode(data, _IMAGES, share=share)
            width, height = control_size(pixels.shape[1], pixels.shape[0], resolution, _IMAGES)
            total += width * height
            worker.check_size(width, height, total, _IMAGES)
            made = await worker.context.preprocessor.preprocess(chosen, pixels, _IMAGES, share=share)
            images.append(await run_in_threadpool(_encoded, made))
    return images


def _encoded(pixels: Pixels) -> str:
    return text_of(encode_image(pixels, Format.PNG, DEFAULT_QUALITY, None))


def controlnet_names(context: DialectContext) -> list[str]:
    """Return the names of all ControlNets, each with the start of its hash, and of IP-Adapters. Blocks."""
    return [*(shown_name(name, digest) for name, digest, _ in networks_of(context)), *adapter_names(context)]


def module_names(context: DialectContext) -> list[str]:
    """Return the names of the detectors that can be used. Reads folders; blocks."""
    adapters = [ADAPTER_MODULE] if adapter_names(context) else []
    return [NO_PREPROCESSOR, *(row.name for row in context.preprocessor.usable()), INPAINT_MODULE, *adapters]


def _add_list_route(
    routes: APIRouter, name: str, body_of: Callable[[DialectContext], Any], schema: type, context: DialectContext
) -> None:
    async def listed(request: Request) -> Response:
        own = context.for_caller(caller_of(request))
        return JSONResponse(await run_in_threadpool(body_of, own))

    routes.add_api_route(
        f"/controlnet/{name}",
        listed,
        methods=["GET"],
        summary=f"ControlNet: {name}",
        description=schema.__doc__,
        operation_id=f"controlnet_{name}",
        response_model=None,
        responses={200: {"model": described(schema)}},
    )


def _modules_body(context: DialectContext) -> ControlNetModulesBody:
    rows = {row.name: row for row in context.preprocessor.usable()}
    sliders = {name: _sliders(rows[name]) if name in rows else [] for name in module_names(context)}
    detail = {name: {"model_free": False, "sliders": part} for name, part in sliders.items()}
    return {"module_list": [*detail], "module_detail": dict(detail)}


def _sliders(row: Preprocessor) -> list[dict[str, object]]:
    resolution = PreprocessorOption(
        RESOLUTION, "Preprocessor Resolution", USUAL_RESOLUTION, RESOLUTION_LOW, RESOLUTION_HIGH, 8
    )
    options = row.options if row.keeps_size else (resolution, *row.options)
    return [
        {"name": one.label, "value": one.default, "min": one.low, "max": one.high, "step": one.step} for one in options
    ]


def _types_body(context: DialectContext) -> ControlNetTypesBody:
    """Return detectors and networks by the names of the extension's tasks; `All` has all of them."""
    rows, networks = context.preprocessor.usable(), networks_of(context)
    everything = {
        "module_list": module_names(context),
        "model_list": ["None", *(shown_name(name, digest) for name, digest, _ in networks)],
    }
    types: dict[str, object] = {"All": {**everything, "default_option": NO_PREPROCESSOR, "default_model": "None"}}
    for title, kind in CONTROL_TYPES.items():
        modules = [row.name for row in rows if kind in row.kinds]
        modules += [INPAINT_MODULE] if kind is ControlKind.INPAINT else []
        models = [shown_name(name, digest) for name, digest, kinds in networks if kind in kinds]
        if modules or models:
            types[title] = {
                "module_list": [NO_PREPROCESSOR, *modules],
                "model_list": ["None", *models],
                "default_option": next((row.name for row in rows if row.kind == kind), NO_PREPROCESSOR),
                "default_model": next(iter(models), "None"),
            }
    return {"control_types": types}
