"""The rows that models of the operator's follow, by what their files say: pipeline class, sizes, defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from stable_diffusion_server.pipelines.catalog import REAL_MODELS
from stable_diffusion_server.pipelines.library import FileIdentity
from stable_diffusion_server.pipelines.library.identity import ModelTask
from stable_diffusion_server.pipelines.model_spec import (
    REFINER,
    TRUE_GUIDANCE,
    USUAL_TASKS,
    ExtraParameter,
    ModelSpec,
)
from stable_diffusion_server.pipelines.scheduler_rows import FOR_FLOWS
from stable_diffusion_server.pipelines.stock_classes import stock_class
from stable_diffusion_server.pipelines.stock_rows import STOCK_ROWS, stock_row
from stable_diffusion_server.types import PromptSyntax, Task

# Keys of owners' specs that models with a UNet have a use for.
_FOR_UNETS = ("guidance_rescale", "schedule", "negative_prompt", "clip_skip", "prediction_type", "zero_snr")

# The repositories and LoRAs of the catalogue's models belong to those alone.
_SDXL = replace(
    REAL_MODELS["sdxl"][-1],
    repo=None,
    control_repo=None,
    lcm_folder=None,
    lcm_repo=None,
    owner_keys=(*_FOR_UNETS, "refiner"),
)
_SCHNELL = replace(REAL_MODELS["flux"][0], repo=None, control_repo=None, owner_keys=("image_prompt",))
_TRUE_GUIDANCE = ExtraParameter(
    TRUE_GUIDANCE, 1, 20, 1, "scale of the negative prompt, beside guidance_scale; 1 is off, more takes twice the time"
)
_DEV = replace(
    _SCHNELL,
    default_steps=28,
    default_guidance=3.5,
    text_tokens=512,
    takes_guidance=True,
    takes_negative_prompt=True,
    reads_empty_negative=True,
    extra=(_TRUE_GUIDANCE,),
    source="model card of FLUX.1-dev: guidance 3.5, 512 tokens; 28 steps as diffusers' call has them",
)
_KREA = replace(
    _DEV,
    default_guidance=4.5,
    source="model card of FLUX.1-Krea-dev: guidance 4.5, 28 to 32 steps; 512 tokens as diffusers' call has them",
)
_FILL = replace(
    _DEV,
    pipeline_class="FluxFillPipeline",
    owner_keys=(),
    default_steps=50,
    default_guidance=30.0,
    takes_negative_prompt=False,
    extra=(),
    control_folder=None,
    tasks=(Task.INPAINT,),
    source="model card of FLUX.1-Fill-dev: 50 steps, guidance 30, 512 tokens",
)
_KONTEXT = replace(
    _DEV,
    pipeline_class="FluxKontextPipeline",
    owner_keys=(),
    default_guidance=2.5,
    control_folder=None,
    tasks=(Task.TEXT_TO_IMAGE, Task.EDIT),
    max_references=1,
    source="model card of FLUX.1-Kontext-dev: guidance 2.5; 28 steps and 512 tokens as diffusers' call has them",
)

_SD15 = replace(
    _SDXL,
    name="sd15",
    family="stable_diffusion_server.pipelines.families.sd15:Sd15",
    folder="",
    pipeline_class="StableDiffusionPipeline",
    revision="sd15",
    native_pixels=512 * 512,
    min_side=256,
    default_steps=50,
    default_guidance=7.5,
    default_scheduler="own",
    schedulers=("own", *_SDXL.schedulers),
    control_folder=None,
    usual_clip_skip=1,
    reads_empty_negative=False,
    takes_prompt_2=False,
    owner_keys=_FOR_UNETS,
    source="model card of stable-diffusion-v1-5: 50 PLMS steps, guidance 7.5, 512 × 512",
)

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
    schedulers=FOR_FLOWS,
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
    reference_pixels=1024 * 1024,
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
    control_class="ZImageControlNetModel",
    control_scale=0.75,
    control_shares_layers=True,
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
_SD3 = replace(
    _KLEIN,
    name="sd3",
    family="stable_diffusion_server.pipelines.families.sd3:StableDiffusion3",
    pipeline_class="StableDiffusion3Pipeline",
    min_side=512,
    text_tokens=256,
    default_steps=28,
    default_guidance=3.5,
    takes_negative_prompt=True,
    takes_guidance=True,
    quantizable_parts=("transformer", "text_encoder_3"),
    dtype="bfloat16",
    tasks=USUAL_TASKS,
    max_references=0,
    prompt_syntax=PromptSyntax.A1111,
    takes_prompt_2=True,
    owner_keys=("negative_prompt", "clip_skip"),
    source="model card of stabilityai/stable-diffusion-3.5-large: 28 steps, guidance 3.5, 256 tokens",
)

# (family, variant, task) as a `FileIdentity` has them → the row. A variant that has no row of its own takes that of "".
_ROWS: Mapping[tuple[str, str, ModelTask], ModelSpec] = {
    ("sdxl", "", ModelTask.NORMAL): _SDXL,
    ("sdxl", "", ModelTask.INPAINT): replace(
        _SDXL, pipeline_class="StableDiffusionXLInpaintPipeline", control_folder=None, owner_keys=_FOR_UNETS
    ),
    ("sd15", "", ModelTask.NORMAL): _SD15,
    ("sd15", "", ModelTask.INPAINT): replace(_SD15, pipeline_class="StableDiffusionInpaintPipeline"),
    ("flux", "schnell", ModelTask.NORMAL): _SCHNELL,
    ("flux", "dev", ModelTask.NORMAL): _DEV,
    ("flux2", "klein", ModelTask.NORMAL): _KLEIN,
    ("flux2", "klein-base", ModelTask.NORMAL): _KLEIN_BASE,
    # Files alone do not say whether they are distilled; most are.
    ("flux2", "klein-4b", ModelTask.NORMAL): _KLEIN,
    ("z-image", "", ModelTask.NORMAL): _Z_IMAGE_TURBO,
    ("z-image", "turbo", ModelTask.NORMAL): _Z_IMAGE_TURBO,
    ("z-image", "base", ModelTask.NORMAL): _Z_IMAGE,
    ("flux", "krea", ModelTask.NORMAL): _KREA,
    ("flux", "fill", ModelTask.FILL): _FILL,
    ("flux", "kontext", ModelTask.EDIT): _KONTEXT,
    ("sd3", "", ModelTask.NORMAL): _SD3,
}


# Channels of a denoiser that takes more than latents, and the task that its own class draws then.
_BY_CHANNELS = {ModelTask.INPAINT: Task.INPAINT, ModelTask.EDIT: Task.EDIT}
# Of UNets; 0 where no configuration says it.
_MORE_CHANNELS = (0, 8, 9)
# Classes that draw with no other UNet; SD's draw with any.
_NEEDS_MASK_CHANNELS = ("KandinskyInpaintCombinedPipeline", "KandinskyV22InpaintCombinedPipeline")
# Models with the same tensors whose tasks differ: variant → task.
_SAME_TENSORS = {"dev": ModelTask.NORMAL, "krea": ModelTask.NORMAL, "kontext": ModelTask.EDIT}


def as_named(identity: FileIdentity, variant: str) -> FileIdentity:
    """The identity with the variant, and its task, that the owner names."""
    same = identity.family == "flux" and identity.variant in _SAME_TENSORS
    return replace(identity, variant=variant, task=_SAME_TENSORS.get(variant, identity.task) if same else identity.task)


def family_row(identity: FileIdentity) -> ModelSpec | None:
    """The row of a model file or folder; `None` if nothing here draws it.

    A folder of a class that only diffusers itself draws has the row of that class.
    """
    row = _ROWS.get((identity.family, identity.variant, identity.task))
    if row is not None and identity.pipeline_class in ("", row.pipeline_class):
        return row
    return (_stock_row(identity) if _is_stock(identity) else None) or row


def _stock_row(identity: FileIdentity) -> ModelSpec | None:
    """The row of a folder's class, without the tasks that its denoiser is not made for.

    A UNet with the channels of a mask or of a second picture draws the task of its own class alone.
    """
    row, known = stock_row(identity.pipeline_class), stock_class(identity.pipeline_class)
    if row is None or known is None:
        return row
    tasks, wanted = row.tasks, _BY_CHANNELS.get(identity.task)
    if wanted in tasks and identity.in_channels in _MORE_CHANNELS:
        tasks = tuple(task for task in tasks if task is wanted)
    elif identity.in_channels not in _MORE_CHANNELS:
        tasks = tuple(task for task in tasks if known.tasks.get(task) not in _NEEDS_MASK_CHANNELS)
    return replace(row, tasks=tasks)


def _is_stock(identity: FileIdentity) -> bool:
    """Whether the class of a folder, or one beside it, draws with its denoiser: not the refiner.

    A class that is named after a task that none of them draws is one of another kind, unless its channels say so too.
    """
    known = stock_class(identity.pipeline_class)
    if known is None or identity.task is ModelTask.REFINER:
        return identity.pipeline_class in STOCK_ROWS
    wanted = _BY_CHANNELS.get(identity.task)
    return wanted is None or wanted in known.tasks or identity.in_channels not in _MORE_CHANNELS


def refined(row: ModelSpec, place: str) -> ModelSpec:
    """The row with the UNet of the refiner at a place within MODELS_DIR."""
    return replace(row, added_parts=((REFINER, place),), quantizable_parts=(*row.quantizable_parts, REFINER))


def prompted_by_images(row: ModelSpec, place: str) -> ModelSpec:
    """The row with the encoders of FLUX.1 Redux at a place within MODELS_DIR: its edits are prompted by images."""
    return replace(
        row,
        added_parts=(("image_encoder", place),),
        tasks=(*row.tasks, Task.EDIT),
        max_references=4,
        image_tokens=729,
    )


def drawn_families() -> str:
    """The families that are drawn, for a sentence."""
    return ", ".join(dict.fromkeys(family for family, _, _ in _ROWS))
