"""The tools that agents see: names, descriptions, and the typed parameters that they share with our routes."""

from __future__ import annotations

from collections.abc import Mapping

from stable_diffusion_server.api.agents.drawing_tool import DrawingTool, Schema, object_schema
from stable_diffusion_server.api.schemas.inpaint_params import InpaintParams
from stable_diffusion_server.api.schemas.params import EditParams, ImageToImageParams, TextToImageParams
from stable_diffusion_server.api.schemas.upscale_params import UpscaleParams

_SHARED = (
    "prompt negative_prompt model seed num_inference_steps guidance_scale scheduler lora format quality timeout"
).split()
_JOB: Schema = {"type": "string", "maxLength": 100, "description": "Id of a job, as a tool answered it."}


DRAWING_TOOLS = {
    tool.name: tool
    for tool in (
        DrawingTool(
            "draw",
            "/create_and_upload_image",
            TextToImageParams,
            "Draw an image from a prompt.",
            (*_SHARED, "width", "height"),
            {},
            ("prompt",),
        ),
        DrawingTool(
            "edit",
            "/edit_and_upload_image",
            EditParams,
            "Edit images by an instruction: the model looks at all of them, in order. `list_models` says which models "
            "edit.",
            (*_SHARED, "width", "height"),
            {"images": "image_url"},
            ("prompt", "images"),
        ),
        DrawingTool(
            "restyle",
            "/style_transfer_and_upload_image",
            ImageToImageParams,
            "Draw over one image by a prompt; `strength` says how much changes. For models that do not edit.",
            (*_SHARED, "strength", "canny"),
            {"image": "image_url"},
            ("prompt", "image"),
        ),
        DrawingTool(
            "inpaint",
            "/inpaint_and_upload_image",
            InpaintParams,
            "Repaint the white parts of a mask, or extend the image by sides; the rest stays exact.",
            (*_SHARED, "strength", "feather", "extend_left", "extend_right", "extend_top", "extend_bottom"),
            {"image": "image_url", "mask": "mask_url"},
            ("prompt", "image"),
        ),
        DrawingTool(
            "upscale",
            "/upscale_and_upload_image",
            UpscaleParams,
            "Enlarge an image.",
            ("upscaler", "scale", "format", "quality", "timeout"),
            {"image": "image_url"},
            ("image",),
        ),
    )
}


LOOKING_TOOLS: Mapping[str, tuple[str, Schema]] = {
    "list_models": ("List the models: the tasks that each draws, and its defaults.", object_schema({})),
    "job_status": (
        "State and progress of a job, with its image once it is done.",
        object_schema({"job_id": _JOB}, "job_id"),
    ),
    "cancel_job": ("Cancel a job; one that has ended does not change.", object_schema({"job_id": _JOB}, "job_id")),
    "history": (
        "Images made here, newest first, searched by words of the prompt.",
        object_schema(
            {
                "query": {"type": "string", "maxLength": 1000, "description": "Words in the prompt."},
                "limit": {"type": "integer", "minimum": 1, "maximum": 50, "default": 10},
                "before": {"type": "integer", "minimum": 1, "description": "The `next` of the page before."},
            }
        ),
    ),
}
READ_ONLY = frozenset({"list_models", "job_status", "history"})
