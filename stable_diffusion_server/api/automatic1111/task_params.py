"""Parameters of AUTOMATIC1111's txt2img and img2img, which are coerced as its own Pydantic models do."""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.generation import NAME_MAX
from stable_diffusion_server.imaging import parse_parameters

P = TypeVar("P", bound="Txt2Img")

_MARGIN_MAX = 2048
# Seeds of 64 bits with and without a sign.
SEED_BOUNDS = -(2**63), 2**64 - 1
_INFOTEXT_MAX = 100_000
# Numbers that must not be booleans.
NUMBERS = "seed steps cfg_scale width height batch_size n_iter denoising_strength mask_blur".split()
_UNIT = "ControlNet "
# Names in an infotext → parameters.
_OF_INFOTEXT = {
    "Prompt": "prompt",
    "Negative prompt": "negative_prompt",
    "Steps": "steps",
    "Sampler": "sampler_name",
    "Schedule type": "scheduler",
    "CFG scale": "cfg_scale",
    "Seed": "seed",
    "Size-1": "width",
    "Size-2": "height",
    "Denoising strength": "denoising_strength",
    "Mask blur": "mask_blur",
    "Eta": "eta",
    "Sigma churn": "s_churn",
    "Sigma tmin": "s_tmin",
    "Sigma tmax": "s_tmax",
    "Sigma noise": "s_noise",
    "Variation seed": "subseed",
    "Variation seed strength": "subseed_strength",
    "Tiling": "tiling",
    "Hires upscale": "hr_scale",
    "Hires upscaler": "hr_upscaler",
    "Hires steps": "hr_second_pass_steps",
    "Hires sampler": "hr_sampler_name",
    "Hires schedule type": "hr_scheduler",
    "Hires CFG Scale": "hr_cfg",
    "Hires prompt": "hr_prompt",
    "Hires negative prompt": "hr_negative_prompt",
    "Hires resize-1": "hr_resize_x",
    "Hires resize-2": "hr_resize_y",
}


class Txt2Img(BaseModel):
    """Parameters of text to image. Others are accepted and ignored, with a sentence in `info`.

    A number may be a text, a whole number may be a float, and a boolean may be 0, 1 or a word such as yes.
    """

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False, coerce_numbers_to_str=True)

    # Parameters that may hold images in base64.
    pictures: ClassVar[frozenset[str]] = frozenset({"alwayson_scripts"})

    prompt: str = Field(
        "",
        description="What the image shows, may be empty; `<lora:name:0.8>` applies a LoRA.",
        examples=["a red circle"],
    )
    negative_prompt: str | None = Field(None, description="What the image must not show.")
    styles: list[str] | None = Field(
        None, description="Styles to put the prompts in, names in `/sdapi/v1/prompt-styles`; others are left out."
    )
    wildcards: bool | None = Field(
        None,
        description="Whether options in braces and lists such as `__colour__` are picked; default: EXPAND_WILDCARDS.",
    )
    seed: int | None = Field(
        None,
        ge=SEED_BOUNDS[0],
        le=SEED_BOUNDS[1],
        description="Negative or omitted: random. Image i of a batch uses `seed + i`. Its lower 32 bits count.",
    )
    subseed: int | None = Field(
        None,
        ge=SEED_BOUNDS[0],
        le=SEED_BOUNDS[1],
        description="Seed of another noise, for `subseed_strength`; negative or omitted: random.",
    )
    subseed_strength: float | None = Field(
        None,
        description="How far the noise is turned to that of `subseed`, 0 to 1; then image i uses `subseed + i`.",
    )
    steps: int | None = Field(None, description="Denoising steps.")
    cfg_scale: float | None = Field(None, description="How strongly to follow the prompt.")
    width: int | None = Field(None, description="Width in pixels, by default 512.")
    height: int | None = Field(None, description="Height in pixels, by default 512.")
    sampler_name: str | None = Field(
        None, max_length=NAME_MAX, description="A name in `/sdapi/v1/samplers`; for others the closest sampler is used."
    )
    sampler_index: str | None = Field(None, max_length=NAME_MAX, description="`sampler_name` of older clients.")
    scheduler: str | None = Field(
        None,
        max_length=NAME_MAX,
        description="Spacing of the steps, a name in `/sdapi/v1/schedulers`; `info` says what is not drawn so.",
    )
    eta: Any = Field(None, description="Share of new noise in a step, for samplers that take it.")
    s_churn: Any = Field(None, description="Noise added before a step, for Euler.")
    s_tmin: Any = Field(None, description="Noise level below which `s_churn` adds none.")
    s_tmax: Any = Field(None, description="Noise level above which `s_churn` adds none; 0: no bound.")
    s_noise: Any = Field(None, description="Factor of the noise that is added.")
    batch_size: int | None = Field(None, ge=1, description="Images in a batch.")
    n_iter: int | None = Field(None, ge=1, description="Batches.")
    denoising_strength: float | None = Field(
        None, description="How much the input image, or the enlarged one, is changed, 0 to 1, by default 0.75."
    )
    enable_hr: bool | None = Field(None, description="Enlarge the image and draw it again (hires fix).")
    hr_scale: float | None = Field(None, description="How much larger the second pass is, by default 2.")
    hr_upscaler: str | None = Field(
        None,
        max_length=NAME_MAX,
        description="A name in `/sdapi/v1/upscalers` or `latent-upscale-modes`; Lanczos stands for others.",
    )
    hr_sampler_name: str | None = Field(None, max_length=NAME_MAX, description="Sampler of the second pass.")
    hr_scheduler: str | None = Field(None, max_length=NAME_MAX, description="Spacing of its steps.")
    hr_prompt: str | None = Field(
        None, description="Its prompt with its LoRAs; if empty, those of the first pass are taken."
    )
    hr_negative_prompt: str | None = Field(None, description="Its negative prompt, likewise.")
    hr_cfg: float | None = Field(None, description="`cfg_scale` of the second pass; 1 or omitted: as in the first.")
    hr_second_pass_steps: int | None = Field(
        None, ge=0, description="Denoising steps of the second pass; 0: as the first."
    )
    hr_resize_x: int | None = Field(
        None, ge=0, description="Width of the second pass; 0: by `hr_scale` or `hr_resize_y`."
    )
    hr_resize_y: int | None = Field(None, ge=0, description="Height of the second pass, likewise.")
    tiling: bool | None = Field(None, description="The image has no seams when it is repeated, for SD 1.5 and SDXL.")
    infotext: str | None = Field(
        None,
        max_length=_INFOTEXT_MAX,
        description="AUTOMATIC1111's parameters text; its values stand for omitted ones.",
    )
    override_settings: dict[str, Any] | None = Field(None, description="`sd_model_checkpoint` and `samples_format`.")
    alwayson_scripts: dict[str, Any] | None = Field(None, description="Units of ControlNet, and Soft Inpainting.")
    send_images: bool | None = Field(None, description="False: the response holds no images; `info` has their URLs.")
    force_task_id: str | None = Field(
        None, max_length=200, description="Id of the task for `progress`, `interrupt` and `skip`."
    )

    @model_validator(mode="before")
    @classmethod
    def _no_booleans_as_numbers(cls, data: Any) -> Any:
        for name in NUMBERS:
            if isinstance(data, dict) and isinstance(data.get(name), bool):
                raise InvalidInput(f"{name} must be a number.", field=name)
        return data

    @property
    def model_extra(self) -> dict[str, Any]:
        """Further parameters."""
        return super().model_extra or {}


class Img2Img(Txt2Img):
    """Parameters of image to image, and with a mask of inpainting."""

    pictures: ClassVar[frozenset[str]] = Txt2Img.pictures | {"init_images", "mask"}

    init_images: list[str] | None = Field(
        None, description="Input images in base64; of several each is an image of the batch."
    )
    resize_mode: int | None = Field(None, ge=0, le=3, description="0 stretch, 1 crop, 2 pad to width and height.")
    mask: str | None = Field(None, description="White where to repaint, in base64.")
    mask_blur: int | None = Field(None, description="Pixels over which the repainted part fades in.")
    inpainting_fill: int | None = Field(None, ge=0, le=3, description="0 surroundings, 1 original, 2 noise, 3 grey.")
    inpaint_full_res: bool | int | None = Field(
        None, description="Generate only the area around the mask, at full size."
    )
    inpaint_full_res_padding: int | None = Field(None, ge=0, le=_MARGIN_MAX, description="Its margin in pixels.")
    script_name: str | None = Field(
        None, max_length=NAME_MAX, description="`Outpainting mk2` or `Poor man's outpainting`; `info` says of others."
    )
    script_args: Any = Field(None, description="The script's arguments, in its order.")
    inpainting_mask_invert: int | None = Field(None, ge=0, le=1, description="1: black is repainted.")


def with_infotext(params: P) -> tuple[P, str, list[str]]:
    """Return the parameters with those of their infotext where they have none, and the model that it names.

    The third value is sentences about values in the infotext that are not valid, which are left out.
    """
    if not params.infotext:
        return params, "", []
    parsed = parse_parameters(params.infotext)
    given = {name: value for name, value in params.model_dump().items() if value not in (None, "")}
    ignored = []
    for theirs, name in _OF_INFOTEXT.items():
        if theirs not in parsed or name in given or name not in type(params).model_fields:
            continue
        try:
            type(params).model_validate({name: parsed[theirs]})
        except ValidationError:
            ignored.append(f"infotext: {theirs} is not valid.")
        else:
            given[name] = parsed[theirs]
    if any(name.startswith(_UNIT) for name in parsed) and "alwayson_scripts" not in given:
        ignored.append("infotext: its control images are not in it, so its ControlNet units are left out.")
    hires = {"Hires upscale", "Hires upscaler", "Hires resize-1"} & set(parsed)
    if hires and "enable_hr" not in given and not isinstance(params, Img2Img):
        given["enable_hr"] = True
    return type(params).model_validate(given), parsed.get("Model", ""), ignored
