"""A tool that makes an image by one of our routes, and the JSON Schema of its parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from stable_diffusion_server.api.openapi.document import bounded_properties
from stable_diffusion_server.generation import RequestLimits

Schema = dict[str, Any]

_IMAGE = "An https URL, a data URL, or a URL of an image that this server made."
_WAIT: Schema = {
    "type": "boolean",
    "default": True,
    "description": "Whether to wait for the image, with progress; otherwise the answer is a job's id for `job_status`.",
}


@dataclass(frozen=True, slots=True)
class DrawingTool:
    """A tool that makes an image by a route: the route's parameters by their names here, and those that are needed.

    `images` are the tool's parameters that hold an image or a list of images, by the route's parameter.
    """

    name: str
    path: str
    params: type[BaseModel]
    description: str
    names: tuple[str, ...]
    images: Mapping[str, str]
    needed: tuple[str, ...]

    def input_schema(self, limits: RequestLimits) -> Schema:
        """Return the JSON Schema of the tool's parameters."""
        route = bounded_properties(self.params, limits)
        properties = {name: route[name] for name in self.names}
        image: Schema = {"type": "string", "description": _IMAGE}
        for name, parameter in self.images.items():
            listed = {"type": "array", "items": image, "minItems": 1, "maxItems": limits.max_references}
            properties[name] = listed if "items" in route[parameter] else image
        return object_schema({**properties, "wait": _WAIT}, *self.needed)


def object_schema(properties: Mapping[str, Schema], *needed: str) -> Schema:
    """Return the JSON Schema of an object with these properties and no others."""
    return {
        "type": "object",
        "properties": dict(properties),
        "required": list(needed),
        "additionalProperties": False,
    }
