"""OpenAPI of request parameters, derived from the parameter models and the limits in the settings."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from pydantic import BaseModel

from stable_diffusion_server.api.request_parsing import BODY_TYPES
from stable_diffusion_server.generation import RequestLimits

Schema = dict[str, Any]


def parameters_openapi(
    model: type[BaseModel], limits: RequestLimits, method: str, media_types: tuple[str, ...] = BODY_TYPES
) -> Schema:
    """Return the `parameters` (GET) or the `requestBody` of an operation that takes the parameters of `model`.

    `media_types` are the accepted media types of its body; only multipart bodies contain files.
    """
    properties = bounded_properties(model, limits)
    required = [name for name, field in model.model_fields.items() if field.is_required()]
    texts = {name: schema for name, schema in properties.items() if not _is_file(schema)}
    if method == "GET":
        return {"parameters": [query_parameter(name, texts[name], required=name in required) for name in texts]}

    def body(shown: Schema) -> Schema:
        schema = {"type": "object", "required": required, "properties": shown, "additionalProperties": False}
        return {"schema": schema}

    content = {kind: body(properties if kind == "multipart/form-data" else texts) for kind in media_types}
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
    for name in ("prompt", "negative_prompt"):
        for part in _variants(properties.get(name, {}), "string"):
            part["maxLength"] = limits.max_prompt_characters
            if name == "prompt":
                part["minLength"] = 1
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
    return [part for part in [schema, *schema.get("anyOf", [])] if part.get("type") in types]


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
