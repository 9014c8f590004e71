"""The rows of diffusers' pipeline classes that no family here draws: each is drawn by its own call.

Classes without a row of their own have the defaults of their call.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from stable_diffusion_server.pipelines.model_spec import TRUE_GUIDANCE, ModelSpec
from stable_diffusion_server.pipelines.stock_classes import StockClass, stock_class
from stable_diffusion_server.types import Task

_TEXT, _IMAGE, _MASK, _EDIT = Task.TEXT_TO_IMAGE, Task.IMAGE_TO_IMAGE, Task.INPAINT, Task.EDIT
_CLASS = "diffusers' defaults of the class"
_T5 = ("transformer", "text_encoder")
# Of classes that say none: CLIP's length, and the guidance of diffusers' guiders.
_CLIP_TOKENS, _GUIDER, _PLAIN_SIDE, _SOME_REFERENCES = 77, 5.0, 1024, 4
_STEPS = 50

_BASE = ModelSpec(
    name="",
    family="stable_diffusion_server.pipelines.families.stock:Stock",
    folder="",
    pipeline_class="",
    revision="",
    native_pixels=1024 * 1024,
    min_side=512,
    text_tokens=256,
    default_steps=50,
    default_guidance=4.0,
    default_scheduler="own",
    schedulers=("own",),
    takes_negative_prompt=True,
    owner_keys=("negative_prompt",),
    rounds_steps_up=True,
    dtype="bfloat16",
    cpu_dtype="bfloat16",
    measured_dtype=True,
    denoiser_part="transformer",
    quantizable_parts=("transformer",),
    tasks=(_TEXT,),
    any_extra=True,
    batches=False,
)


def _row(class_name: str, steps: int, guidance: float, source: str, **changes: object) -> ModelSpec:
    values = {"default_steps": steps, "default_guidance": guidance, "source": source, **changes}
    return replace(_BASE, pipeline_class=f"{class_name}Pipeline", **values)  # type: ignore[arg-type]  # fields by name


def _edit(class_name: str, steps: int, references: int, source: str, **changes: object) -> ModelSpec:
    given = {"text_tokens": 512, "quantizable_parts": _T5, "tasks": (_EDIT,), **changes}
    return _row(class_name, steps, 4.0, source, max_references=references, **given)


_ROWS = (
    _row(
        "Chroma",
        40,
        3.0,
        "model card of lodestones/Chroma1-HD",
        text_tokens=512,
        tasks=(_TEXT, _IMAGE),
        quantizable_parts=_T5,
    ),
    _row("Lumina2", 50, 4.0, "model card of Alpha-VLLM/Lumina-Image-2.0", quantizable_parts=_T5),
    _row("Lumina", 30, 4.0, _CLASS, quantizable_parts=_T5),
    _row("AuraFlow", 50, 3.5, "model card of fal/AuraFlow-v0.3", quantizable_parts=_T5),
    _row("Sana", 20, 4.5, "model card of Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers", text_tokens=300),
    _row("PixArtSigma", 20, 4.5, "model card of PixArt-alpha/PixArt-Sigma-XL-2-1024-MS", text_tokens=300),
    _row("PixArtAlpha", 20, 4.5, _CLASS, text_tokens=120),
    _row(
        "QwenImage",
        50,
        4.0,
        "model card of Qwen/Qwen-Image",
        native_pixels=1328 * 1328,
        text_tokens=512,
        tasks=(_TEXT, _IMAGE, _MASK),
        quantizable_parts=_T5,
        guidance_name=TRUE_GUIDANCE,
    ),
    _edit(
        "QwenImageEdit",
        50,
        1,
        "model card of Qwen/Qwen-Image-Edit",
        guidance_name=TRUE_GUIDANCE,
        tasks=(_MASK, _EDIT),
    ),
    _edit("QwenImageEditPlus", 40, 3, "model card of Qwen/Qwen-Image-Edit-2509", guidance_name=TRUE_GUIDANCE),
    _row("Krea2", 28, 4.5, _CLASS, text_tokens=512, quantizable_parts=_T5),
    _row(
        "HiDreamImage",
        50,
        5.0,
        "model card of HiDream-ai/HiDream-I1-Full",
        text_tokens=128,
        quantizable_parts=("transformer", "text_encoder_3", "text_encoder_4"),
    ),
    _row(
        "HunyuanImage",
        50,
        3.5,
        "model card of hunyuanvideo-community/HunyuanImage-2.1-Diffusers",
        native_pixels=2048 * 2048,
        text_tokens=1000,
        takes_guidance=False,  # the folder's guider says it
        quantizable_parts=_T5,
    ),
    _row("HunyuanDiT", 50, 5.0, _CLASS),
    _row(
        "Kolors",
        50,
        5.0,
        "model card of Kwai-Kolors/Kolors-diffusers",
        dtype="float16",
        denoiser_part="unet",
        quantizable_parts=("unet",),
        tasks=(_TEXT, _IMAGE),
    ),
    _row(
        "CogView4", 50, 3.5, "model card of zai-org/CogView4-6B", text_tokens=1024, quantizable_parts=_T5
    ),
    _row("CogView3Plus", 50, 7.0, _CLASS, text_tokens=224, quantizable_parts=_T5),
    _row("OvisImage", 50, 5.0, _CLASS, quantizable_parts=_T5),
    _row(
        "Kandinsky3", 25, 3.0, _CLASS, text_tokens=128, denoiser_part="unet", quantizable_parts=("unet",),
        rounds_steps_up=False, tasks=(_TEXT, _IMAGE),
    ),
    _row("Kandinsky5T2I", 50, 3.5, _CLASS, text_tokens=512),
    _row("PRX", 28, 4.0, _CLASS),
    _row("Bria", 30, 5.0, _CLASS, text_tokens=128),
)  # fmt: skip

STOCK_ROWS: Mapping[str, ModelSpec] = {row.pipeline_class: row for row in _ROWS}


def stock_row(pipeline_class: str) -> ModelSpec | None:
    """The row of a pipeline class; `None` for one that is not drawn this way."""
    if pipeline_class in STOCK_ROWS:
        return STOCK_ROWS[pipeline_class]
    known = stock_class(pipeline_class)
    return None if known is None else _row_of_call(known)


def _row_of_call(known: StockClass) -> ModelSpec:
    """The row of a class by the defaults of its call."""
    parameters, defaults = known.parameters, known.defaults
    side = int(defaults.get("height", _PLAIN_SIDE))
    guided = known.guider or bool(parameters.guidance)
    return replace(
        _BASE,
        pipeline_class=known.name,
        native_pixels=side * side,
        min_side=min(_BASE.min_side, side // 64 * 64),
        text_tokens=int(defaults.get("max_sequence_length", _CLIP_TOKENS)),
        default_steps=int(defaults.get("num_inference_steps", _STEPS)),
        default_guidance=float(defaults.get(parameters.guidance, _GUIDER)) if guided else 0.0,
        takes_guidance=guided,
        guidance_name=parameters.guidance or _BASE.guidance_name,
        takes_negative_prompt="negative_prompt" in parameters.names,
        denoiser_part=known.denoiser,
        quantizable_parts=(known.denoiser,),
        tasks=tuple(task for task in Task if task in known.tasks),
        max_references=_SOME_REFERENCES if _EDIT in known.tasks else 0,
        # The hooks that move weights are those of ordinary pipelines.
        offload="none" if known.modular else "",
        source=_CLASS,
    )
