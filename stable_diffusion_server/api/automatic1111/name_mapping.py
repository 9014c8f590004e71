"""Maps our names of parameters to AUTOMATIC1111's, in errors and in bounds."""

from __future__ import annotations

import re

from stable_diffusion_server.errors import ServerError

_FIELDS = {
    "num_inference_steps": "steps",
    "guidance_scale": "cfg_scale",
    "strength": "denoising_strength",
    "hires_width": "hr_resize_x",
    "hires_height": "hr_resize_y",
    "hires_steps": "hr_second_pass_steps",
    "hires_strength": "denoising_strength",
    "hires_upscaler": "hr_upscaler",
    "hires_scheduler": "hr_sampler_name",
    "hires_schedule": "hr_scheduler",
    "hires_guidance": "hr_cfg",
    "hires_negative_prompt": "hr_negative_prompt",
    "hires_prompt": "hr_prompt",
    "hires_loras": "hr_prompt",
    "canny": "alwayson_scripts",
    "mask_mode": "alwayson_scripts",
    "repairs": "alwayson_scripts",
    "controls": "alwayson_scripts",
    "canny_low": "alwayson_scripts",
    "canny_high": "alwayson_scripts",
    "control_scale": "alwayson_scripts",
    "scheduler": "sampler_name",
    "schedule": "scheduler",
    "lora": "prompt",
    "feather": "mask_blur",
    **dict.fromkeys(("extend_left", "extend_right", "extend_top", "extend_bottom", "extend_overlap"), "script_args"),
    "model": "override_settings",
}
_WORDS = ("model", "lora", "canny", "controls", "repairs")
_OUR_NAMES = re.compile("|".join(rf"\b{ours}\b" for ours in _FIELDS if ours not in _WORDS))


# AUTOMATIC1111's parameters with bounds → the parameters of this server with the same bounds.
BOUNDED = {
    "steps": "num_inference_steps",
    "cfg_scale": "guidance_scale",
    "denoising_strength": "strength",
    "mask_blur": "feather",
}


def renamed(error: ServerError) -> ServerError:
    """Return the error with AUTOMATIC1111's parameter names."""
    if _base(error.field or "") not in _FIELDS:
        return error
    detail = _OUR_NAMES.sub(lambda match: _FIELDS[match[0]], error.detail)
    faults = [
        (_FIELDS.get(_base(field), field), _OUR_NAMES.sub(lambda m: _FIELDS[m[0]], sentence))
        for field, sentence in error.faults
    ]
    return type(error)(detail, field=_FIELDS[_base(error.field or "")], faults=faults, retry_after=error.retry_after)


def _base(field: str) -> str:
    """Return the parameter that a field is in: `repairs` of `repairs[0].steps`."""
    return field.partition("[")[0]
