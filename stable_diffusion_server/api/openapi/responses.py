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
    """An object of these parts; it is not closed, so that it can grow. A test closes it against real answers."""
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
_PROBLEM = {"type": TEXT, "title": TEXT, "status": WHOLE, "detail": TEXT}
_LOADED = {
    **dict.fromkeys(("name", "folder", "revision", "device", "dtype", "residency", "quantization"), TEXT),
    **dict.fromkeys(("bytes", "default_steps", "native_pixels"), WHOLE),
    **dict.fromkeys(("follows_edges", "usual", "takes_negative_prompt", "takes_guidance"), TRUTH),
    "default_guidance": NUMBER,
    "loras": several(TEXT),
    "unusable_loras": several(TEXT),
    "commit": TEXT,
    "remarks": several(TEXT),
}
_TASK_STATE = {
    **dict.fromkeys(("skipped", "interrupted", "stopping_generation"), TRUTH),
    **dict.fromkeys(("job", "job_timestamp"), TEXT),
    **dict.fromkeys(("job_count", "job_no", "sampling_step", "sampling_steps"), WHOLE),
}
_HISTORY_ENTRY = {
    **dict.fromkeys(("key", "prompt", "model", "task", "caller", "digest"), TEXT),
    "path": {"type": "string", "format": "uri"},
    **dict.fromkeys(("seed", "width", "height", "number"), WHOLE),
    "drawn_at": {"type": "string", "format": "date-time"},
}
_EVENT_STATES = ["queued", "running", "done", "failed", "cancelled"]
# Times are in seconds since 1970, UTC.
_JOB = {
    "id": TEXT,
    "state": {"type": "string", "enum": _EVENT_STATES},
    "accepted_at": NUMBER,
    "ended_at": maybe(NUMBER),
    "attempts": WHOLE,
    "position": WHOLE,
    "eta_seconds": maybe(NUMBER),
    "step": WHOLE,
    "steps": WHOLE,
}
_JOB_OUTCOME = {
    "receipt": named("Receipt"),
    "problem": thing(_PROBLEM, field=TEXT, errors=several(_FIELD)),
}

SCHEMAS: dict[str, Schema] = {
    "Problem": thing({**_PROBLEM, "request_id": TEXT}, field=TEXT, errors=several(_FIELD)),
    "OpenAIError": thing({"error": thing({"message": TEXT, "type": TEXT, "param": maybe(TEXT), "code": maybe(TEXT)})}),
    "WebuiError": thing({"error": TEXT, "detail": TEXT, "body": TEXT, "errors": ANY, "request_id": TEXT}),
    "Receipt": thing(_RECEIPT, prompt_used=TEXT, batched=maybe(TRUTH)),
    "Replayed": thing(
        {**_RECEIPT, "replay": thing({"same_order": TRUTH, "equal": TRUTH, "decibels": maybe(NUMBER)})},
        prompt_used=TEXT,
        batched=maybe(TRUTH),
    ),
    "Job": thing(_JOB, **_JOB_OUTCOME),
    "JobEvent": thing(_JOB, **_JOB_OUTCOME, content_type=TEXT, image=TEXT),
    "Jobs": thing({"jobs": several(named("Job"))}),
    "History": thing({"pictures": several(thing(_HISTORY_ENTRY)), "next": maybe(WHOLE)}),
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
            "state": thing(_TASK_STATE),
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
            "textinfo": maybe(TEXT),
        }
    ),
    "WebuiOptions": thing(
        {
            **dict.fromkeys(("sd_model_checkpoint", "samples_format", "sd_vae"), TEXT),
            "CLIP_stop_at_last_layers": WHOLE,
        }
    ),
    "WebuiModels": several(
        thing(
            {
                **dict.fromkeys(("title", "model_name", "filename"), TEXT),
                **dict.fromkeys(("hash", "sha256", "config"), maybe(TEXT)),
            }
        )
    ),
    "WebuiSamplers": several(thing({"name": TEXT, "aliases": several(TEXT), "options": {"type": "object"}})),
    "WebuiLoras": several(thing({"name": TEXT, "alias": TEXT, "path": TEXT, "metadata": {"type": "object"}})),
    "WebuiPngInfo": thing({"info": TEXT, "items": {"type": "object"}, "parameters": {"type": "object"}}),
    "Record": thing({"key": TEXT, "source": TEXT, "record": {"type": "object"}}),
    "Health": thing({"status": TEXT}),
    # `models` and `remarks` are there for callers with a key, or where no key is needed.
    "Readiness": thing(
        {"status": TEXT, "missing": several(TEXT)}, models=several(thing(_LOADED)), remarks=several(TEXT)
    ),
}
