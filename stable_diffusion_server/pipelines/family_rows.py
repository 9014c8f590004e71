"""The rows that models of the operator's follow, by what their files say: pipeline class, sizes, defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from stable_diffusion_server.pipelines.catalog import REAL_MODELS
from stable_diffusion_server.pipelines.library import FileIdentity
from stable_diffusion_server.pipelines.library.identity import ModelTask
from stable_diffusion_server.pipelines.model_spec import USUAL_TASKS, ModelSpec
from stable_diffusion_server.pipelines.stock_rows import STOCK_ROWS, stock_row
from stable_diffusion_server.types import Task

# The repositories and LoRAs of the catalogue's models belong to those alone.
_SDXL = replace(
    REAL_MODELS["sdxl"][-1],
    repo=None,
    control_repo=None,
    lcm_folder=None,
    lcm_repo=None,
    owner_keys=("guidance_rescale", "schedule", "negative_prompt", "clip_skip", "prediction_type", "zero_snr"),
)
_SCHNELL = replace(REAL_MODELS["flux"][0], repo=None, control_repo=None)
_DEV = replace(_SCHNELL, default_steps=28, default_guidance=3.5, text_tokens=512, takes_guidance=True)

_KLEIN = ModelSpec(
    name="flux2",
    family="stable_diffusion_server.pipelines.families.flux2_klein:Flux2Klein",
    folder="",
    pipeline_class="Flux2KleinPipeline",
    revision="",
    native_pixels=1024 * 1024,
    min_side=256,
    text_tokens=512,
    default_steps=4,
    default_guidance=1.0,
    default_scheduler="flow_euler",
    schedulers=("flow_euler",),
    takes_negative_prompt=False,
    takes_guidance=False,
    rounds_steps_up=True,
    denoiser_part="transformer",
    quantizable_parts=("transformer", "text_encoder"),
    dtype="bfloat16",
    cpu_dtype="bfloat16",
    measured_dtype=True,
    tasks=(*USUAL_TASKS, Task.EDIT),
    max_references=4,
    source="model card of black-forest-labs/FLUX.2-klein-4B: 4 steps, guidance 1",
)
_KLEIN_BASE = replace(
    _KLEIN,
    default_steps=50,
    default_guidance=4.0,
    takes_negative_prompt=True,
    takes_guidance=True,
    owner_keys=("negative_prompt",),
    source="model card of black-forest-labs/FLUX.2-klein-base-4B: 50 steps, guidance 4",
)
_Z_IMAGE_TURBO = replace(
    _KLEIN,
    name="z-image",
    family="stable_diffusion_server.pipelines.families.z_image:ZImage",
    pipeline_class="ZImagePipeline",
    min_side=512,
    default_steps=8,
    default_guidance=0.0,
    tasks=USUAL_TASKS,
    max_references=0,
    # The card's 9 steps were 8 passes and one without effect; diffusers since 0.38 counts passes.
    source="model card of Tongyi-MAI/Z-Image-Turbo: 8 passes, guidance 0",
)
_Z_IMAGE = replace(
    _Z_IMAGE_TURBO,
    default_steps=50,
    default_guidance=4.0,
    takes_negative_prompt=True,
    takes_guidance=True,
    owner_keys=("negative_prompt",),
    source="model card of Tongyi-MAI/Z-Image: 28 to 50 steps, guidance 3 to 5",
)

# (family, variant, task) as a `FileIdentity` has them → the row. A variant that has no row of its own takes that of "".
_ROWS: Mapping[tuple[str, str, ModelTask], ModelSpec] = {
    ("sdxl", "", ModelTask.NORMAL): _SDXL,
    ("sdxl", "", ModelTask.INPAINT): replace(
        _SDXL, pipeline_class="StableDiffusionXLInpaintPipeline", control_folder=None
    ),
    ("flux", "schnell", ModelTask.NORMAL): _SCHNELL,
    ("flux", "dev", ModelTask.NORMAL): _DEV,
    ("flux2", "klein", ModelTask.NORMAL): _KLEIN,
    ("flux2", "klein-base", ModelTask.NORMAL): _KLEIN_BASE,
    ("z-image", "turbo", ModelTask.NORMAL): _Z_IMAGE_TURBO,
    ("z-image", "base", ModelTask.NORMAL): _Z_IMAGE,
}


def family_row(identity: FileIdentity) -> ModelSpec | None:
    """The row of a model file or folder; `None` if nothing here draws it.

    A folder of a class that only diffusers itself draws has the row of that class.
    """
    row = _ROWS.get((identity.family, identity.variant, identity.task))
    if row is not None and identity.pipeline_class in ("", row.pipeline_class):
        return row
    return stock_row(identity.pipeline_class) or row


def drawn_families() -> str:
    """The families that are drawn, for a sentence."""
    families = ", ".join(dict.fromkeys(family for family, _, _ in _ROWS))
    return f"{families}, and diffusers folders of {len(STOCK_ROWS)} further classes (docs/models.md)"
