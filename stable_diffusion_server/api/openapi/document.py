"""Completes the OpenAPI document: what every operation answers, how it refuses, keys, enums, examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from stable_diffusion_server.api.openapi.responses import SCHEMAS, Schema, maybe, named
from stable_diffusion_server.pipelines import MODELS

_BINARY: Schema = {"type": "string", "format": "binary"}
_PICTURE = {f"image/{kind}": {"schema": _BINARY} for kind in ("webp", "png", "jpeg")}
_DRAWING_ERRORS = (400, 401, 403, 409, 413, 415, 421, 422, 429, 500, 502, 503, 504)
_READING_ERRORS = (400, 401, 403, 404, 413, 415, 421, 422, 500, 503)
_RECEIPT_EXAMPLE = {
    "path": "http://127.0.0.1:8000/files/static/uploads/demo/first.webp",
    "key": "static/uploads/demo/first.webp",
    "stored": True,
    "cached": False,
    "coalesced": False,
    "task": "text_to_image",
    "model": next(iter(MODELS)),
    "seed": 1234567,
    "width": 1024,
    "height": 1024,
    "num_inference_steps": 4,
    "guidance_scale": 2.0,
    "scheduler": "euler",
    "warnings": [],
    "timings": {"total": 0.81},
}
# What an operation answers when all is well, by its id: status → schema's name, or media types of its own.
_SAID: dict[str, dict[int, str]] = {
    "create_image": {200: "Images", 202: "Job"},
    "create_image_edit": {200: "Images", 202: "Job"},
    "list_models": {200: "Models"},
    "retrieve_model": {200: "Model"},
    "sdapi_txt2img": {200: "WebuiPictures"},
    "sdapi_img2img": {200: "WebuiPictures"},
    "sdapi_progress": {200: "WebuiProgress"},
    "sdapi_internal_progress": {200: "WebuiTask"},
    "sdapi_options": {200: "WebuiOptions"},
    "sdapi_sd_models": {200: "WebuiModels"},
    "sdapi_samplers": {200: "WebuiSamplers"},
    "sdapi_loras": {200: "WebuiLoras"},
    "sdapi_png_info": {200: "WebuiPngInfo"},
    "replay": {200: "Replayed"},
    "history": {200: "History"},
    "list_jobs": {200: "Jobs"},
    "get_job": {200: "Job"},
    "cancel_job": {200: "Job"},
    "healthz": {200: "Health"},
    "readyz": {200: "Readiness", 503: "Readiness"},
}
_EVENTS = {"create_image", "create_image_edit"}
_OPEN = {"healthz", "readyz", "file_get", "file_head"}


def install_openapi(app: FastAPI, models: Callable[[], Mapping[str, tuple[str, ...]]], *, keys_needed: bool) -> None:
    """Have the app tell its whole document; `models` tells the schedulers of each model by its name.

    It is made again when these are others, as they may be once the models are loaded.
    """
    made: list[tuple[Mapping[str, tuple[str, ...]], dict[str, Any]]] = []

    def document() -> dict[str, Any]:
        now = dict(models())
        if not made or made[0][0] != now:
            made[:] = [(now, _described(app, now, keys_needed=keys_needed))]
        return made[0][1]

    told: Callable[[], dict[str, Any]] = document
    app.openapi = told  # type: ignore[method-assign]  # FastAPI's own way to extend the document


def _described(app: FastAPI, models: Mapping[str, tuple[str, ...]], *, keys_needed: bool) -> dict[str, Any]:
    document = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
    components = document.setdefault("components", {})
    components["schemas"] = SCHEMAS
    components["securitySchemes"] = {
        "bearer": {"type": "http", "scheme": "bearer", "description": "One of API_KEYS."},
        "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
        "password": {"type": "http", "scheme": "basic", "description": "A key as the password, with any name."},
    }
    for path, operations in document["paths"].items():
        for operation in operations.values():
            _complete(path, operation)
            if keys_needed and operation["operationId"] not in _OPEN:
                operation["security"] = [{"bearer": []}, {"key": []}, {"password": []}]
            for shape in _properties(operation):
                _enumerate(shape, models)
    return document


def _complete(path: str, operation: dict[str, Any]) -> None:
    """Every answer an operation can give."""
    name = operation["operationId"]
    draws = "draw" in operation.get("tags", ()) or name in (
        "create_image",
        "create_image_edit",
        "sdapi_txt2img",
        "sdapi_img2img",
    )
    shape, media_type = _error_of(path)
    errors = _DRAWING_ERRORS if draws else _READING_ERRORS
    responses: dict[str, Any] = {
        str(status): {"description": HTTPStatus(status).phrase, "content": {media_type: {"schema": named(shape)}}}
        for status in errors
    }
    responses["default"] = {"description": "Any other refusal", "content": {media_type: {"schema": named(shape)}}}
    again = {"Retry-After": {"description": "Seconds", "schema": {"type": "integer"}}}
    responses.update(
        {status: {**responses[status], "headers": again} for status in ("429", "503") if status in responses}
    )
    responses.update(_successes(name, operation))
    operation["responses"] = dict(sorted(responses.items()))


def _successes(name: str, operation: dict[str, Any]) -> dict[str, Any]:
    if name in _SAID:
        told: dict[str, Any] = {
            str(status): {
                "description": HTTPStatus(status).phrase,
                "content": {"application/json": {"schema": named(shape)}},
            }
            for status, shape in _SAID[name].items()
        }
        if name in _EVENTS:
            told["200"]["content"]["text/event-stream"] = {"schema": {"type": "string"}}
        return told
    ok: dict[str, Any] = {"description": "OK"}
    if name.startswith("make_image"):
        ok["content"] = _PICTURE
    elif "draw" in operation.get("tags", ()):
        ok["content"] = {"application/json": {"schema": named("Receipt"), "example": _RECEIPT_EXAMPLE}}
    elif name == "file_get":
        ok["content"] = {**_PICTURE, "application/json": {"schema": named("Record")}}
        partial = {"description": "A part of it", "content": _PICTURE}
        return {
            "200": ok,
            "206": partial,
            "304": {"description": "It has not changed"},
            "307": {"description": "There"},
        }
    elif name == "file_delete":
        return {"204": {"description": "Deleted"}}
    elif name == "job_events":
        ok["content"] = {"text/event-stream": {"schema": {"type": "string"}}}
        return {"200": ok, "204": {"description": "Its end was told"}}
    elif name == "metrics":
        ok["content"] = {"text/plain": {"schema": {"type": "string"}}}
    else:
        ok["content"] = {"application/json": {"schema": {}}}
    if "draw" in operation.get("tags", ()):
        accepted = {
            "description": "A job, for `Prefer: respond-async`",
            "content": {"application/json": {"schema": named("Job")}},
        }
        return {"200": ok, "202": accepted}
    return {"200": ok}


def _error_of(path: str) -> tuple[str, str]:
    if path.startswith(("/v1/images/", "/v1/models")):
        return "OpenAIError", "application/json"
    if path.startswith(("/sdapi/", "/internal/")):
        return "WebuiError", "application/json"
    return "Problem", "application/problem+json"


def _properties(operation: dict[str, Any]) -> list[dict[str, Schema]]:
    """The named shapes of an operation's query and of its bodies."""
    query = {part["name"]: part["schema"] for part in operation.get("parameters", ()) if part["in"] == "query"}
    contents = operation.get("requestBody", {}).get("content", {}).values()
    return [query, *(content["schema"].get("properties", {}) for content in contents)]


def _enumerate(shapes: dict[str, Schema], models: Mapping[str, tuple[str, ...]]) -> None:
    """Say which schedulers there are; models go by further names in other dialects, so those stay open."""
    if "scheduler" in shapes and "num_inference_steps" in shapes:
        names = sorted({name for schedulers in models.values() for name in schedulers})
        kept = {
            part: value for part, value in shapes["scheduler"].items() if part in ("title", "description", "default")
        }
        shapes["scheduler"] = {**kept, **maybe({"type": "string", "enum": names})}
    if "model" in shapes and "size" not in shapes and "num_inference_steps" in shapes:
        kept = {part: value for part, value in shapes["model"].items() if part in ("title", "description", "default")}
        shapes["model"] = {**kept, **maybe({"type": "string", "enum": sorted(models)})}
