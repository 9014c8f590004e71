"""What the caller asks for."""

from __future__ import annotations

from dataclasses import dataclass

from stable_diffusion_server.types.choices import (
    Extension,
    ExtraValue,
    Fill,
    Fit,
    MaskMode,
    PromptSyntax,
    Seed,
    Task,
    Tiling,
)
from stable_diffusion_server.types.guidance import DetailRepair
from stable_diffusion_server.types.requests import Format, InputImages


@dataclass(frozen=True, slots=True)
class GenerationRequest(InputImages):
    """A request as the caller sent it; `None` means that the server chooses.

    Attributes:
        width: Width in pixels; by default that of `image`, or of the model.
        height: Height in pixels, likewise.
        save_path: Object key to store the image under; by default it is derived from the request.
        overwrite: Whether to generate and store even if the object exists.
        timeout: Seconds until the request fails with `DeadlineExceeded`.
        strength: Share of the denoising steps applied to the input image, 0..1.
        feather: Width in pixels over which the edge of the mask is softened inwards.
        canny: Whether Canny edges of the input image guide the result, with the two thresholds.
        loras: Name and weight of each LoRA.
        lora_parts: Weights of LoRAs by parts of the model, by name, as `read_lora_parts` reads them.
        named_by_content: Whether the request's digest is put before the file name, which makes it unique.
        webhook_url: URL that is called when the job ends.
        folder: Where an image without `save_path` is stored, with a slash at the end.
        variation: Index of the image in a batch; it is added to the seed.
        fit: How `image` is brought to the requested size.
        fill: What replaces the masked part before it is repainted.
        only_masked: If set, the area around the mask with this margin in pixels is repainted at the requested size.
        mask_mode: How grey parts of the mask are read.
        extend: How far `image` is extended; its new sides are inpainted, beside what `mask` covers.
        alone: Whether the request must not share forward passes, so that it can be reproduced bit for bit.
        named_for: Caller that a derived object key belongs to.
        hires_width: Width in pixels of a second pass over the enlarged image; without one `None`.
        hires_height: Its height in pixels, likewise.
        hires_steps: Its denoising steps; by default as many as in the first pass.
        hires_strength: Share of its denoising steps that is applied, 0..1; by default 0.75.
        hires_upscaler: Name of the upscaler before it; by default Lanczos.
        hires_scheduler: Its scheduler; by default that of the first pass.
        hires_prompt: Its prompt; by default that of the first pass.
        hires_negative_prompt: Its negative prompt, likewise.
        hires_scale: How many times larger it is than the image of the first pass, in place of its width and height.
        hires_guidance: Its guidance scale; by default that of the first pass.
        hires_schedule: Spacing of its steps; by default that of the first pass, if its scheduler takes it.
        hires_loras: Its LoRAs with their weights; by default those of the first pass.
        repairs: Parts of the finished image that are found and drawn again, in order.
        allow_empty_prompt: Whether the prompt may be empty.
        at_least_one_step: Whether a `strength` that would leave no step draws one, instead of being refused.
        extra: Parameters that only some models have, by name.
        prompt_syntax: How the prompts are written; by default as the model's users write them.
        clip_skip: Last layers of CLIP that are left out, more than usual; `None` for the model's own.
        sampling: Options of the sampler by name: its `schedule`, `eta` and so on.
        prompt_2: What the second text encoder reads in place of `prompt`.
        styles: Names of the styles that the prompts are put in.
        wildcards: Whether wildcards in the prompts are expanded; by default as the server's settings say.
        expanded: Whether the prompts were changed by styles or wildcards.
        tiling: Borders that meet when the image is repeated.
        upscaler: Name of the upscaler of `Task.UPSCALE`.
        scale: Factor of both sides, in place of `width` and `height`.
    """

    task: Task
    prompt: str
    width: int | None = None
    height: int | None = None
    save_path: str | None = None
    model: str | None = None
    negative_prompt: str | None = None
    seed: Seed = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    scheduler: str | None = None
    format: Format | None = None
    quality: int | None = None
    overwrite: bool = False
    timeout: float | None = None
    strength: float | None = None
    feather: int = 0
    canny: bool | None = False
    canny_low: int = 100
    canny_high: int = 200
    control_scale: float | None = None
    refine: bool = False
    loras: tuple[tuple[str, float], ...] = ()
    lora_parts: tuple[tuple[str, str], ...] = ()
    named_by_content: bool = False
    webhook_url: str | None = None
    folder: str = ""
    variation: int = 0
    fit: Fit = Fit.CROP
    fill: Fill = Fill.ORIGINAL
    only_masked: int | None = None
    mask_mode: MaskMode = MaskMode.HARD
    extend: Extension | None = None
    alone: bool = False
    named_for: str = ""
    hires_width: int | None = None
    hires_height: int | None = None
    hires_steps: int | None = None
    hires_strength: float | None = None
    hires_upscaler: str | None = None
    hires_scheduler: str | None = None
    hires_prompt: str | None = None
    hires_negative_prompt: str | None = None
    hires_scale: float | None = None
    hires_guidance: float | None = None
    hires_schedule: str | None = None
    hires_loras: tuple[tuple[str, float], ...] | None = None
    repairs: tuple[DetailRepair, ...] = ()
    allow_empty_prompt: bool = False
    at_least_one_step: bool = False
    extra: tuple[tuple[str, ExtraValue], ...] = ()
    prompt_syntax: PromptSyntax | None = None
    clip_skip: int | None = None
    sampling: tuple[tuple[str, ExtraValue], ...] = ()
    prompt_2: str | None = None
    styles: tuple[str, ...] = ()
    wildcards: bool | None = None
    expanded: bool = False
    tiling: Tiling | None = None
    upscaler: str | None = None
    scale: float | None = None
