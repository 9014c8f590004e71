"""A version of a model as Replicate's clients read it: the schema of its input and output."""

from __future__ import annotations

from typing import Any

from typing_extensions import TypedDict

from stable_diffusion_server.api.openapi.document import bounded_properties
from stable_diffusion_server.api.replicate.prediction_input import PredictionInput
from stable_diffusion_server.generation import RequestLimits
from stable_diffusion_server.pipelines import ModelSpec

# The version of Cog from which on clients read `x-cog-array-type`, and the time of models without one.
_COG_VERSION, _EPOCH = "0.9.0", "1970-01-01T00:00:00Z"


class VersionBody(TypedDict):
    """A version: here each model has one, with the model's name. `openapi_schema` describes input and output."""

    id: str
    created_at: str
    cog_version: str
    openapi_schema: dict[str, Any]


def version_body(version: str, spec: ModelSpec, limits: RequestLimits) -> VersionBody:
    """Return a version of a model under the name that the client has for it."""
    properties = bounded_properties(PredictionInput, limits)
    properties["num_inference_steps"] = {**properties["num_inference_steps"], "default": spec.default_steps}
    schemas = {
        "Input": {"type": "object", "title": "Input", "properties": properties, "required": ["prompt"]},
        "Output": {"type": "array", "title": "Output", "items": {"type": "string", "format": "uri"}},
    }
    return {
        "id": version,
        "created_at": _EPOCH,
        "cog_version": _COG_VERSION,
        "openapi_schema": {"openapi": "3.0.2", "info": {"title": spec.name}, "components": {"schemas": schemas}},
    }
