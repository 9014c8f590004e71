"""A request, a job, a result and a claim with every field set, for tests of the job store."""

from __future__ import annotations

from stable_diffusion_server.jobs.store.records import IdempotencyClaim, JobPayload, JobRecord
from stable_diffusion_server.types import (
    Caller,
    Extension,
    Fill,
    Fit,
    Format,
    GenerationRequest,
    GenerationResult,
    ImageInput,
    PromptSyntax,
    RequestWarning,
    Task,
    Tiling,
)

WHOLE = GenerationRequest(
    Task.INPAINT,
    "a red square",
    width=96,
    height=80,
    save_path="a.png",
    model="sdxl",
    negative_prompt="blue",
    seed=7,
    num_inference_steps=5,
    guidance_scale=1.5,
    scheduler="ddim",
    format=Format.PNG,
    quality=90,
    overwrite=True,
    timeout=9.5,
    named_for="ann",
    hires_width=128,
    hires_height=192,
    hires_steps=7,
    hires_strength=0.4,
    allow_empty_prompt=True,
    at_least_one_step=True,
    image=ImageInput("image_url", url="https://pictures.example/a.png"),
    mask=ImageInput("mask_file", data=b"mask", transparency=True),
    strength=0.5,
    feather=3,
    canny=None,
    canny_low=90,
    canny_high=210,
    control_scale=0.7,
    refine=True,
    loras=(("pastel", 0.5),),
    named_by_content=True,
    folder="ann/",
    variation=1,
    fit=Fit.PAD,
    fill=Fill.NOISE,
    only_masked=8,
    extend=Extension(8, 0, 16, 0, 4),
    alone=True,
    webhook_url="https://hook.example/",
    references=(
        ImageInput("image[1]", url="https://pictures.example/b.png"),
        ImageInput("image[2]", data=b"reference"),
    ),
    extra=(("true_cfg_scale", 2.5), ("fast", True), ("name", "x"), ("count", 3)),
    prompt_syntax=PromptSyntax.COMPEL,
    clip_skip=2,
    prompt_2="a plain wall",
    tiling=Tiling.Y,
    sampling=(("eta", 0.5), ("schedule", "karras")),
    styles=("anime", "night"),
    wildcards=True,
    expanded=True,
)
WORK = JobPayload(WHOLE, {"image_url": b"image", "image[1]": b"other"})
RECEIPT = GenerationResult(
    *("static/uploads/a.png", True, False, False, "inpaint", "sdxl", 7, 96, 80, 5, 1.5, "ddim"),
    warnings=(RequestWarning("bumpy", "It is."),),
    timings={"queue": 0.1},
)
ENTRY = JobRecord("job-1", Caller("ann", "ann/"), 1000.0, base_url="http://here", webhook_url="https://hook.example/")
CLAIM = IdempotencyClaim("ann", "key-1", "print-1")
