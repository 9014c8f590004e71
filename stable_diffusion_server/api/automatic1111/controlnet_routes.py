"""Routes of AUTOMATIC1111's ControlNet extension: what it has, and `detect`. This server has Canny edges."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field
from typing_extensions import TypedDict  # pydantic rejects typing.TypedDict before Python 3.12

from stable_diffusion_server.api.automatic1111.image_work import ImageWorker, json_of, read_body
from stable_diffusion_server.api.dependencies import DialectContext, caller_of
from stable_diffusion_server.api.http_responses import JSONResponse
from stable_diffusion_server.api.openapi.document import coerced_properties, json_body
from stable_diffusion_server.api.schemas.responses import described
from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.generation import NAME_MAX
from stable_diffusion_server.imaging import Pixels, canny, resize_image
from stable_diffusion_server.pipelines import ModelSpec

# The version of the extension's API, and the units that one request may have here.
_API_VERSION, _UNITS = 2, 1
_NONE, _CANNY = "none", "canny"
MODULES = (_NONE, _CANNY)
# Default, minimum and maximum: of the shorter side in pixels, and of both thresholds. The extension replaces a value
# that is out of range by the default.
_RESOLUTION, _LOW, _HIGH = (512, 64, 2048), (100, 1, 255), (200, 1, 255)
_IMAGES_MAX = 32
_HASH_CHARACTERS = 8
_IMAGES, _OLDER_IMAGES = "controlnet_input_images", "controlnet_images"


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

    controlnet_module: str = Field(_NONE, max_length=NAME_MAX, description="`canny`, or `none` for the image itself.")
    controlnet_input_images: list[str] = Field([], max_length=_IMAGES_MAX, description="The images in base64.")
    controlnet_images: list[str] = Field([], max_length=_IMAGES_MAX, description=f"Older name of `{_IMAGES}`.")
    controlnet_processor_res: int = Field(-1, description="Shorter side in pixels, 64 to 2048; -1: 512.")
    controlnet_threshold_a: float = Field(-1, description="Lower threshold, 1 to 255; -1: 100.")
    controlnet_threshold_b: float = Field(-1, description="Upper threshold, 1 to 255; -1: 200.")

    @property
    def finds_edges(self) -> bool:
        """Whether the module is Canny. Raises `InvalidInput` for an unknown one."""
        module = self.controlnet_module.strip().lower()
        if module not in MODULES:
            raise InvalidInput("Module not available: there are none and canny.", field="controlnet_module")
        return module == _CANNY

    def size_of(self, width: int, height: int) -> tuple[int, int]:
        """Return the size of the map of an image in pixels."""
        if not self.finds_edges:
            return width, height
        scale = _within(self.controlnet_processor_res, _RESOLUTION) / min(width, height)
        return round(width * scale), round(height * scale)

    def detect(self, pixels: Pixels, width: int, height: int) -> Pixels:
        """Return the map of an image."""
        if not self.finds_edges:
            return pixels
        low, high = _within(self.controlnet_threshold_a, _LOW), _within(self.controlnet_threshold_b, _HIGH)
        return canny(resize_image(pixels, width, height), round(low), round(high))


def add_controlnet_routes(routes: APIRouter, worker: ImageWorker) -> None:
    """Add the routes of the extension."""
    bodies: tuple[tuple[str, Callable[[list[str]], Any], type], ...] = (
        ("version", lambda models: {"version": _API_VERSION}, ControlNetVersionBody),
        ("model_list", lambda models: {"model_list": models}, ControlNetModelsBody),
        ("module_list", lambda models: _modules_body(), ControlNetModulesBody),
        ("settings", lambda models: {"control_net_unit_count": _UNITS}, ControlNetSettingsBody),
        ("control_types", _types_body, ControlNetTypesBody),
    )
    for name, body_of, schema in bodies:
        _add_list_route(routes, name, body_of, schema, worker.context)

    @routes.post(
        "/controlnet/detect",
        summary="ControlNet: find edges",
        operation_id="controlnet_detect",
        openapi_extra=json_body(coerced_properties(DetectParams, worker.context.limits), _IMAGES),
        response_model=None,
        responses={200: {"model": described(ControlNetDetectBody)}},
    )
    async def detect(request: Request) -> Response:
        """Return the edges of images."""
        params = await read_body(request, DetectParams, frozenset({_IMAGES, _OLDER_IMAGES}))
        given = params.controlnet_input_images or params.controlnet_images
        images = await worker.change(request, given, _IMAGES, params.size_of, params.detect)
        return await json_of({"images": images, "info": "Success"}, images)


def controlnet_names(context: DialectContext) -> list[str]:
    """Return the names of the ControlNets of all models, each with the start of its hash."""
    return list(dict.fromkeys(_controlnet_name(spec) for spec in context.models.values() if spec.control_folder))


def _controlnet_name(spec: ModelSpec) -> str:
    name = (spec.control_folder or "").rpartition("/")[2]
    return f"{name} [{spec.control_weights[:_HASH_CHARACTERS]}]" if spec.control_weights else name


def _add_list_route(
    routes: APIRouter, name: str, body_of: Callable[[list[str]], Any], schema: type, context: DialectContext
) -> None:
    async def listed(request: Request) -> Response:
        return JSONResponse(body_of(controlnet_names(context.for_caller(caller_of(request)))))

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


def _modules_body() -> ControlNetModulesBody:
    sliders = [
        _slider("Preprocessor Resolution", _RESOLUTION, 8),
        _slider("Low Threshold", _LOW, 1),
        _slider("High Threshold", _HIGH, 1),
    ]
    detail = {name: {"model_free": False, "sliders": part} for name, part in ((_NONE, []), (_CANNY, sliders))}
    return {"module_list": list(MODULES), "module_detail": dict(detail)}


def _slider(name: str, bounds: tuple[int, int, int], step: int) -> dict[str, object]:
    default, low, high = bounds
    return {"name": name, "value": default, "min": low, "max": high, "step": step}


def _types_body(models: list[str]) -> ControlNetTypesBody:
    named = ["None", *models]
    every = {"module_list": list(MODULES), "model_list": named}
    first = models[0] if models else "None"
    return {
        "control_types": {
            "All": {**every, "default_option": _NONE, "default_model": "None"},
            "Canny": {**every, "default_option": _CANNY, "default_model": first},
        }
    }


def _within(value: float, bounds: tuple[int, int, int]) -> float:
    """Return a value, or the default if it is out of range."""
    default, low, high = bounds
    return value if low <= value <= high else default
