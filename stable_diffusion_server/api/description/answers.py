"""The shapes of what is answered, as JSON Schema: one for each, by the name a client generator gives it."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
WHOLE: Schema = {"type": "integer"}
NUMBER: Schema = {"type": "number"}
TRUTH: Schema = {"type": "boolean"}
ANY: Schema = {}


def maybe(shape: Schema) -> Schema:
    """That shape, or null."""
    return {"anyOf": [shape, {"type": "null"}]}


def several(shape: Schema) -> Schema:
    """A list of that shape."""
    return {"type": "array", "items": shape}


def thing(_needed: dict[str, Schema], **may_be_there: Schema) -> Schema:
    """An object of these parts; what may be there beside them is not closed, so that it can grow."""
    return {"type": "object", "required": sorted(_needed), "properties": {**_needed, **may_be_there}}


def named(name: str) -> Schema:
    """A reference to one of `SCHEMAS`."""
    return {"$ref": f"#/components/schemas/{name}"}


_FIELD = thing({"field": TEXT, "detail": TEXT})
_WARNING = thing({"code": TEXT, "message": TEXT})
_RECEIPT = {
    "path": {"type": "string", "format": "uri"},
    "key": TEXT,
    "stored": TRUTH,
    "cached": TRUTH,
    "coalesced": TRUTH,
    "task": TEXT,
    **{name: maybe(TEXT) for name in ("model", "scheduler")},
    **{name: maybe(WHOLE) for name in ("seed", "width", "height", "num_inference_steps")},
    "guidance_scale": maybe(NUMBER),
    "warnings": several(_WARNING),
    "timings": {"type": "object", "additionalProperties": NUMBER},
}
_EVENT_STATES = ["queued", "running", "done", "failed", "cancelled"]

SCHEMAS: dict[str, Schema] = {
    "Problem": thing(
        {"type": TEXT, "title": TEXT, "status": WHOLE, "detail": TEXT, "request_id": TEXT},
        field=TEXT,
        errors=several(_FIELD),
    ),
    "OpenAIError": thing({"error": thing({"message": TEXT, "type": TEXT, "param": maybe(TEXT), "code": maybe(TEXT)})}),
    "WebuiError": thing({"error": TEXT, "detail": TEXT, "body": TEXT, "errors": ANY, "request_id": TEXT}),
    "Receipt": thing(_RECEIPT, prompt_used=TEXT, batched=maybe(TRUTH)),
    "Replayed": thing({**_RECEIPT, "replay": thing({"same_order": TRUTH, "equal": TRUTH, "decibels": maybe(NUMBER)})}),
    "Job": thing(
        {"id": TEXT, "state": {"type": "string", "enum": _EVENT_STATES}},
        position=maybe(WHOLE),
        eta_seconds=maybe(NUMBER),
        step=maybe(WHOLE),
        steps=maybe(WHOLE),
        receipt=maybe(named("Receipt")),
        problem=maybe(thing({"title": TEXT, "status": WHOLE, "detail": TEXT})),
    ),
    "Jobs": thing({"jobs": several(named("Job"))}),
    "History": thing({"pictures": several(thing({"path": TEXT, "key": TEXT})), "next": maybe(WHOLE)}),
    "Images": thing(
        {
            "created": WHOLE,
            "data": several(
                thing(
                    {"key": TEXT, "seed": maybe(WHOLE), "model": maybe(TEXT), "cached": TRUTH},
                    url=TEXT,
                    b64_json=TEXT,
                    revised_prompt=TEXT,
                )
            ),
            "size": TEXT,
            "output_format": TEXT,
            "quality": TEXT,
            "background": TEXT,
            "warnings": several(_WARNING),
        },
        usage={"type": "object"},
    ),
    "Model": thing({"id": TEXT, "object": {"const": "model"}, "created": WHOLE, "owned_by": TEXT}, revision=TEXT),
    "Models": thing({"object": {"const": "list"}, "data": several(named("Model"))}),
    "WebuiPictures": thing({"images": several(TEXT), "parameters": {"type": "object"}, "info": TEXT}),
    "WebuiProgress": thing(
        {
            "progress": {"type": "number", "minimum": 0, "maximum": 1},
            "eta_relative": NUMBER,
            "state": thing({"job": TEXT, "job_count": WHOLE, "sampling_step": WHOLE, "sampling_steps": WHOLE}),
            "current_image": maybe(TEXT),
            "textinfo": maybe(TEXT),
        }
    ),
    "WebuiTask": thing(
        {
            **dict.fromkeys(("active", "queued", "completed"), TRUTH),
            **dict.fromkeys(("progress", "eta"), maybe(NUMBER)),
            "live_preview": maybe(TEXT),
            "id_live_preview": WHOLE,
        }
    ),
    "WebuiOptions": thing({"sd_model_checkpoint": TEXT, "samples_format": TEXT}),
    "WebuiModels": several(thing({"title": TEXT, "model_name": TEXT, "hash": maybe(TEXT)})),
    "WebuiSamplers": several(thing({"name": TEXT, "aliases": several(TEXT), "options": {"type": "object"}})),
    "WebuiLoras": several(thing({"name": TEXT, "alias": TEXT, "path": TEXT})),
    "WebuiPngInfo": thing({"info": TEXT, "items": {"type": "object"}, "parameters": {"type": "object"}}),
    "Record": thing({"key": TEXT, "source": TEXT, "record": {"type": "object"}}),
    "Health": thing({"status": TEXT}),
    "Readiness": thing({"status": TEXT, "missing": several(TEXT)}),
}
