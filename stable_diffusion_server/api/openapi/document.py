"""Completes FastAPI's OpenAPI document: parameters, error responses, API keys, names of models and schedulers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from functools import lru_cache
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, TypeAdapter

from stable_diffusion_server.api.dialect_paths import is_openai_path
from stable_diffusion_server.api.problems import is_automatic1111_path
from stable_diffusion_server.api.request_parsing import BODY_TYPES
from stable_diffusion_server.api.schemas.responses import (
    Automatic1111ErrorBody,
    JobEventBody,
    OpenAIErrorBody,
    ProblemBody,
)
from stable_diffusion_server.generation import RequestLimits

Schema = dict[str, Any]

EVENT_STREAM: Schema = {"text/event-stream": {"schema": {"type": "string"}}}
IMAGE_FILE: Schema = {
    f"image/{kind}": {"schema": {"type": "string", "format": "binary"}} for kind in ("webp", "png", "jpeg")
}
_GENERATION_ERRORS = (400, 401, 403, 409, 413, 415, 421, 422, 429, 500, 502, 503, 504)
_OTHER_ERRORS = (400, 401, 403, 404, 413, 415, 421, 422, 500, 503)
_RETRY_AFTER = {"Retry-After": {"description": "Seconds", "schema": {"type": "integer"}}}
_GENERATING = {"create_image", "create_image_edit", "create_image_variation", "sdapi_txt2img", "sdapi_img2img"}
_WITHOUT_KEY = {"healthz", "readyz", "file_get", "file_head"}
_REF = "#/components/schemas/{model}"
# Bodies that no operation declares as its response. FastAPI adds the schemas of the others.
_FURTHER_BODIES: tuple[Any, ...] = (ProblemBody, OpenAIErrorBody, Automatic1111ErrorBody, JobEventBody)
_FASTAPI_ERRORS = ("HTTPValidationError", "ValidationError")
_BODY_NAME = re.compile(r"\b([A-Z]\w+)Body\b")


def install_openapi(
    app: FastAPI,
    models: Callable[[], Mapping[str, tuple[str, ...]]],
    *,
    keys_needed: bool,
    names_models: bool = True,
) -> None:
    """Set the app's OpenAPI document; `models` returns the schedulers of each model by its name.

    Without `names_models` the document lists no models.
    Caches the document until `models` returns another value, as it may after the models are loaded.
    """
    cache: list[tuple[Mapping[str, tuple[str, ...]], Schema]] = []

    def current_document() -> Schema:
        current = dict(models())
        if not cache or cache[0][0] != current:
            document = _build(app, current, keys_needed=keys_needed, names_models=names_models)
            cache[:] = [(current, document)]
        return cache[0][1]

    app.openapi = current_document  # type: ignore[method-assign]  # FastAPI's own way to extend the document


def _build(app: FastAPI, models: Mapping[str, tuple[str, ...]], *, keys_needed: bool, names_models: bool) -> Schema:
    document = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
    components = document.setdefault("components", {})
    components["schemas"] = _component_schemas(components.get("schemas", {}))
    components["securitySchemes"] = {
        "bearer": {"type": "http", "scheme": "bearer", "description": "One of API_KEYS."},
        "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
        "azure": {"type": "apiKey", "in": "header", "name": "api-key"},
        "password": {"type": "http", "scheme": "basic", "description": "A key as the password, with any name."},
    }
    for path, operations in document["paths"].items():
        for operation in operations.values():
            _add_errors(path, operation)
            if keys_needed and operation["operationId"] not in _WITHOUT_KEY:
                operation["security"] = [{"bearer": []}, {"key": []}, {"azure": []}, {"password": []}]
            for properties in _parameters_of(operation):
                _set_names(properties, models, names_models=names_models)
    return _without_body_suffix(document)


def _component_schemas(found: Schema) -> Schema:
    """Return FastAPI's schemas without its own errors, plus the schemas of bodies that no operation declares."""
    bodies = [(body.__name__, "serialization", TypeAdapter(body)) for body in _FURTHER_BODIES]
    _, further = TypeAdapter.json_schemas(bodies, ref_template=_REF)  # type: ignore[arg-type]  # the mode is a literal
    schemas = {**found, **further["$defs"]}
    return {name: schema for name, schema in sorted(schemas.items()) if name not in _FASTAPI_ERRORS}


def _add_errors(path: str, operation: Schema) -> None:
    """Add every error that an operation can answer, in the format of its dialect."""
    generates = "draw" in operation.get("tags", ()) or operation["operationId"] in _GENERATING
    body, media_type = _error_of(path)
    content = {media_type: {"schema": {"$ref": _REF.format(model=body.__name__)}}}
    errors: Schema = {
        str(status): {"description": HTTPStatus(status).phrase, "content": content}
        for status in (_GENERATION_ERRORS if generates else _OTHER_ERRORS)
    }
    for status in {"429", "503"} & set(errors):
        errors[status] = {**errors[status], "headers": _RETRY_AFTER}
    successes = {status: said for status, said in operation["responses"].items() if status != "422"}
    default = {"description": "Any other error", "content": content}
    operation["responses"] = dict(sorted({**errors, "default": default, **successes}.items()))


def _error_of(path: str) -> tuple[type, str]:
    if is_openai_path(path):
        return OpenAIErrorBody, "application/json"
    if is_automatic1111_path(path):
        return Automatic1111ErrorBody, "application/json"
    return ProblemBody, "application/problem+json"


def _parameters_of(operation: Schema) -> list[dict[str, Schema]]:
    """Return the schemas by name of an operation's query parameters and of each of its bodies."""
    query = {part["name"]: part["schema"] for part in operation.get("parameters", ()) if part["in"] == "query"}
    contents = operation.get("requestBody", {}).get("content", {}).values()
    return [query, *(content["schema"].get("properties", {}) for content in contents)]


def _set_names(properties: dict[str, Schema], models: Mapping[str, tuple[str, ...]], *, names_models: bool) -> None:
    """Enumerate schedulers and models. Other dialects accept further model names, so those are not enumerated."""
    if "num_inference_steps" not in properties:
        return
    if "scheduler" in properties:
        names = sorted({name for schedulers in models.values() for name in schedulers})
        properties["scheduler"] = _enumerated(properties["scheduler"], names)
    if names_models and "model" in properties and "size" not in properties:
        properties["model"] = _enumerated(properties["model"], sorted(models))


def _enumerated(schema: Schema, names: list[str]) -> Schema:
    described = {part: value for part, value in schema.items() if part in ("title", "description", "default")}
    return {**described, "anyOf": [{"type": "string", "enum": names}, {"type": "null"}]}


def _without_body_suffix(document: Schema) -> Schema:
    """Name the schemas as clients should see them: `GenerationResult`, not `GenerationResultBody`."""
    renamed: Schema = json.loads(_BODY_NAME.sub(r"\1", json.dumps(document)))
    return renamed


def parameters_openapi(
    model: type[BaseModel], limits: RequestLimits, method: str, media_types: tuple[str, ...] = BODY_TYPES
) -> Schema:
    """Return the `parameters` (GET) or the `requestBody` of an operation that takes the parameters of `model`.

    `media_types` are the accepted media types of its body; only multipart bodies contain files.
    """
    properties = bounded_properties(model, limits)
    required = [name for name, field in model.model_fields.items() if field.is_required()]
    texts = {name: _text_schema(schema) for name, schema in properties.items() if not _is_file(schema)}
    if method == "GET":
        return {"parameters": [query_parameter(name, texts[name], required=name in required) for name in texts]}

    def body(shown: Schema) -> Schema:
        schema = {"type": "object", "required": required, "properties": shown, "additionalProperties": False}
        return {"schema": schema}

    forms = {name: _form_schema(schema) for name, schema in properties.items()}
    content = {kind: body(forms if kind == "multipart/form-data" else texts) for kind in media_types}
    return {"requestBody": {"required": bool(required), "content": content}}


def query_parameter(name: str, schema: Schema, *, required: bool = False) -> Schema:
    """Return a query parameter; a description in its schema becomes that of the parameter."""
    schema = dict(schema)
    description = schema.pop("description", "")
    return {"name": name, "in": "query", "required": required, "schema": schema, "description": description}


def json_body(properties: Schema, *required: str) -> Schema:
    """Return the `requestBody` of a JSON object that may have further members."""
    schema = {"type": "object", "properties": properties, "required": list(required)}
    return {"requestBody": {"required": bool(required), "content": {"application/json": {"schema": schema}}}}


def bounded_properties(model: type[BaseModel], limits: RequestLimits) -> Schema:
    """Return the parameters of a model by name, as JSON Schema with the bounds in the settings."""
    schema = json_schema_of(model)
    properties: Schema = _inline(schema["properties"], schema.get("$defs", {}))
    for name, (low, high) in limits.bounds().items():
        if name in properties:
            set_bounds(properties[name], low, high)
    for name in ("prompt", "negative_prompt", "prompt_2"):
        for part in _variants(properties.get(name, {}), "string"):
            part["maxLength"] = limits.max_prompt_characters
            if name == "prompt" and model.model_fields[name].is_required():
                part["minLength"] = 1
    return properties


def coerced_properties(
    model: type[BaseModel], limits: RequestLimits, no_booleans: Collection[str] = frozenset()
) -> Schema:
    """Return `bounded_properties` with the types that Pydantic converts to the declared ones.

    Numbers may be texts and booleans, except those in `no_booleans`; booleans may be numbers and texts; texts may be
    numbers if the model is configured so.
    """
    more = {"integer": ["string", "boolean"], "number": ["string", "boolean"], "boolean": ["number", "string"]}
    if model.model_config.get("coerce_numbers_to_str"):
        more["string"] = ["number"]
    properties = bounded_properties(model, limits)
    for name, schema in properties.items():
        for part in _variants(schema, *more):
            kinds = [part["type"], *more[part["type"]]]
            part["type"] = [kind for kind in kinds if kind != "boolean" or name not in no_booleans]
    return properties


@lru_cache(64)
def json_schema_of(model: type[BaseModel]) -> Schema:
    """Return Pydantic's JSON Schema of a model.

    Do not modify it: it is cached, because 15 schemas took 60 % of `create_app`.
    """
    return model.model_json_schema()


def set_bounds(schema: Schema, low: float, high: float) -> None:
    """Write bounds into the numeric variants of a property."""
    for part in _variants(schema, "integer", "number"):
        part.update(minimum=low, maximum=high)


def _variants(schema: Schema, *types: str) -> list[Schema]:
    """Return the parts of a schema whose type, or first type, is one of these."""
    parts = [schema, *schema.get("anyOf", [])]
    return [
        part for part in parts if (part["type"][0] if isinstance(part.get("type"), list) else part.get("type")) in types
    ]


def _form_schema(schema: Schema) -> Schema:
    """Return the schema of a parameter in a multipart form: what may be a file is one."""
    if "items" in schema:
        return {**schema, "items": _form_schema(schema["items"])}
    files = [part for part in schema.get("anyOf", ()) if _is_file(part)]
    return {**{name: part for name, part in schema.items() if name != "anyOf"}, **files[0]} if files else schema


def _text_schema(schema: Schema) -> Schema:
    """Return the schema of a parameter in JSON, which holds no file."""
    if "items" in schema:
        return {**schema, "items": _text_schema(schema["items"])}
    parts = schema.get("anyOf", ())
    return {**schema, "anyOf": [part for part in parts if not _is_file(part)]} if parts else schema


def _is_file(schema: Schema) -> bool:
    return schema.get("format") == "binary" or schema.get("items", {}).get("format") == "binary"


def _inline(schema: Any, definitions: Schema) -> Any:
    """Replace each reference by its definition, because definitions of parameters are not in the components."""
    if isinstance(schema, list):
        return [_inline(part, definitions) for part in schema]
    if not isinstance(schema, dict):
        return schema
    if (reference := schema.get("$ref")) is not None:
        return _inline(definitions[reference.rsplit("/", 1)[1]], definitions)
    return {name: _inline(part, definitions) for name, part in schema.items()}
