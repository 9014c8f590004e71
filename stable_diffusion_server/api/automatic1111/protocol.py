"""Parameters of txt2img and img2img, converted to generation requests, with sentences about ignored ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from secrets import randbelow
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from stable_diffusion_server.api.automatic1111.checkpoint_names import model_named
from stable_diffusion_server.api.automatic1111.controlnet_units import CannyUnit, parse_units
from stable_diffusion_server.api.automatic1111.name_mapping import extract_loras, ignored_syntax, scheduler_for
from stable_diffusion_server.api.automatic1111.options import FORMATS, Option
from stable_diffusion_server.api.base64_images import bytes_of
from stable_diffusion_server.api.dependencies import DialectContext
from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.generation import NAME_MAX
from stable_diffusion_server.types import SEED_MAX, Fill, Fit, Format, GenerationRequest, ImageInput, Task

_FITS = (Fit.STRETCH, Fit.CROP, Fit.PAD, Fit.STRETCH)
_FILLS = (Fill.SURROUNDINGS, Fill.ORIGINAL, Fill.NOISE, Fill.GREY)
# Parameters without effect on this server, with their neutral values, which cause no warning.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    **dict.fromkeys(("subseed_strength", "seed_resize_from_h", "seed_resize_from_w", "s_churn", "s_tmax"), (0, -1)),
    **dict.fromkeys(("s_tmin", "s_min_uncond", "firstphase_width", "firstphase_height"), (0, -1)),
    **dict.fromkeys(("subseed",), (-1,)),
    **dict.fromkeys(("eta", "s_noise", "initial_noise_multiplier"), (0, 1)),
    **dict.fromkeys(("image_cfg_scale",), (1.5,)),
    **dict.fromkeys(
        ("enable_hr", "restore_faces", "tiling", "include_init_images", "disable_extra_networks"), (False,)
    ),
    **dict.fromkeys(("do_not_save_samples", "do_not_save_grid", "save_images"), (True, False)),
    **dict.fromkeys(("override_settings_restore_afterwards",), (True,)),
    **dict.fromkeys(("sampler_index", "force_task_id", "send_images", "comments", "infotext"), ()),
}
_SILENT = (
    "sampler_index",
    "denoising_strength",
    "do_not_save_samples",
    "do_not_save_grid",
    "save_images",
    "hr_",
    "comments",
    "infotext",
)
_KNOWN_SETTINGS = {"sd_model_checkpoint", "samples_format"}
_MARGIN_MAX = 2048
# Maximum characters of tags in a prompt, in addition to MAX_PROMPT_CHARACTERS of text.
_TAGS_MAX = 1000
# Maximum number of sentences about ignored parameters.
_MOST_IGNORED = 100


class Txt2Img(BaseModel):
    """Parameters of text to image. Others are accepted and ignored, with a sentence in `info`."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False, strict=True)

    # Parameters that may hold images in base64.
    pictures: ClassVar[frozenset[str]] = frozenset({"alwayson_scripts"})

    prompt: str = Field(
        "", description="What the image shows; `<lora:name:0.8>` applies a LoRA.", examples=["a red circle"]
    )
    negative_prompt: str | None = Field(None, description="What the image must not show.")
    seed: int | None = Field(
        None, ge=-1, le=SEED_MAX, description="-1 or omitted: random. Image i of a batch uses `seed + i`."
    )
    steps: int | None = Field(None, description="Denoising steps.")
    cfg_scale: float | None = Field(None, description="How strongly to follow the prompt.")
    width: int | None = Field(None, description="Width in pixels, by default 512.")
    height: int | None = Field(None, description="Height in pixels, by default 512.")
    sampler_name: str | None = Field(
        None, max_length=NAME_MAX, description="A name in `/sdapi/v1/samplers`, or a similar sampler of AUTOMATIC1111."
    )
    sampler_index: str | None = Field(None, max_length=NAME_MAX, description="`sampler_name` of older clients.")
    scheduler: str | None = Field(
        None, max_length=NAME_MAX, description="Spacing of the steps; `info` says if it is ignored."
    )
    batch_size: int | None = Field(None, ge=1, description="Images in a batch.")
    n_iter: int | None = Field(None, ge=1, description="Batches.")
    override_settings: dict[str, Any] | None = Field(None, description="`sd_model_checkpoint` and `samples_format`.")
    alwayson_scripts: dict[str, Any] | None = Field(None, description="A Canny unit of ControlNet.")
    send_images: bool | None = Field(None, description="False: the response holds no images; `info` has their URLs.")
    force_task_id: str | None = Field(
        None, max_length=200, description="Id of the task for `progress` and `interrupt`."
    )

    @model_validator(mode="before")
    @classmethod
    def _no_booleans_as_numbers(cls, data: Any) -> Any:
        numbers = "seed steps cfg_scale width height batch_size n_iter denoising_strength mask_blur".split()
        for name in numbers:
            if isinstance(data, dict) and isinstance(data.get(name), bool):
                raise InvalidInput(f"{name} must be a number.", field=name)
        return data


class Img2Img(Txt2Img):
    """Parameters of image to image, and with a mask of inpainting."""

    pictures: ClassVar[frozenset[str]] = Txt2Img.pictures | {"init_images", "mask"}

    init_images: list[str] | None = Field(None, description="The input image in base64; only the first is used.")
    resize_mode: int | None = Field(None, ge=0, le=3, description="0 stretch, 1 crop, 2 pad to width and height.")
    denoising_strength: float | None = Field(None, description="How much is changed, 0 to 1, by default 0.75.")
    mask: str | None = Field(None, description="White where to repaint, in base64.")
    mask_blur: int | None = Field(None, description="Pixels over which the repainted part fades in.")
    inpainting_fill: int | None = Field(None, ge=0, le=3, description="0 surroundings, 1 original, 2 noise, 3 grey.")
    inpaint_full_res: bool | int | None = Field(
        None, description="Generate only the area around the mask, at full size."
    )
    inpaint_full_res_padding: int | None = Field(None, ge=0, le=_MARGIN_MAX, description="Its margin in pixels.")
    inpainting_mask_invert: int | None = Field(None, ge=0, le=1, description="1: black is repainted.")


@dataclass(frozen=True, slots=True)
class ParsedTask:
    """A generation request for each image, and sentences about ignored parameters."""

    generations: list[GenerationRequest]
    ignored: list[str]


def parse_task(params: Txt2Img, context: DialectContext, options: Mapping[str, Option]) -> ParsedTask:
    """Convert the parameters; `options` are the caller's, which `override_settings` override. Raises `InvalidInput`."""
    longest = context.limits.max_prompt_characters + _TAGS_MAX
    if len(params.prompt) > longest:
        raise InvalidInput(f"prompt must not be longer than {longest} characters, tags included.", field="prompt")
    overridden = {name: value for name, value in (params.override_settings or {}).items() if value is not None}
    settings = {**options, **overridden}
    named = _text(settings, "sd_model_checkpoint") or str(options.get("sd_model_checkpoint", ""))
    own = model_named(named, context) if named else None
    spec = context.model(own)
    scheduler, about_scheduler = scheduler_for(
        params.sampler_name or params.sampler_index or "", params.scheduler or "", spec
    )
    edges, about_scripts = parse_units(params.alwayson_scripts or {})
    prompt, loras = extract_loras(params.prompt)
    count = (params.batch_size or 1) * (params.n_iter or 1)
    if count > context.max_n:
        raise InvalidInput(f"batch_size × n_iter must not be more than {context.max_n}.", field="batch_size")
    width, height = _pixels(params, context)
    context.check_size(count, width, height, "batch_size")
    generation = GenerationRequest(
        task=Task.TEXT_TO_IMAGE,
        prompt=prompt,
        width=width,
        height=height,
        model=own,
        negative_prompt=params.negative_prompt or None,
        seed=randbelow(SEED_MAX + 1) if params.seed in (None, -1) else params.seed,
        num_inference_steps=params.steps,
        guidance_scale=params.cfg_scale,
        scheduler=scheduler,
        format=_format(settings),
        loras=loras,
    )
    ignored = [
        *filter(None, [about_scheduler]),
        *about_scripts,
        *ignored_syntax(params.prompt),
        *_ignored_parameters(params, settings),
    ]
    generation, about_images = _with_images(generation, params, edges)
    ignored = [*ignored, *about_images][:_MOST_IGNORED]
    return ParsedTask([replace(generation, variation=number) for number in range(count)], ignored)


def _with_images(
    generation: GenerationRequest, params: Txt2Img, edges: CannyUnit | None
) -> tuple[GenerationRequest, list[str]]:
    ignored: list[str] = []
    if edges is not None:
        generation = replace(
            generation, canny=True, canny_low=edges.low, canny_high=edges.high, control_scale=edges.weight
        )
    if not isinstance(params, Img2Img):
        if edges is None:
            return generation, ignored
        if not edges.image:
            raise InvalidInput("A ControlNet unit needs its image here.", field="alwayson_scripts")
        # Only the image's edges are used, so its pixels do not constrain the result (strength 1).
        image = ImageInput("alwayson_scripts", data=bytes_of(edges.image, "alwayson_scripts"))
        return replace(generation, task=Task.IMAGE_TO_IMAGE, image=image, strength=1.0), ignored
    if not params.init_images:
        raise InvalidInput("init_images must hold a picture in base64.", field="init_images")
    data = bytes_of(params.init_images[0], "init_images")
    if len(params.init_images) > 1:
        ignored.append("init_images: the first is taken.")
    if edges is not None and edges.image and bytes_of(edges.image, "alwayson_scripts") != data:
        ignored.append("controlnet: the edges are taken from init_images.")
    generation = replace(
        generation,
        task=Task.IMAGE_TO_IMAGE,
        image=ImageInput("init_images", data=data),
        fit=_FITS[params.resize_mode or 0],
        strength=0.75 if params.denoising_strength is None else params.denoising_strength,
    )
    if not params.mask:
        return generation, ignored
    if edges is not None:
        ignored.append("controlnet: edges are not followed where a mask is.")
    whole = params.inpaint_full_res is not None and not params.inpaint_full_res
    return replace(
        generation,
        task=Task.INPAINT,
        canny=False,
        mask=ImageInput("mask", data=bytes_of(params.mask, "mask"), inverted=params.inpainting_mask_invert == 1),
        feather=4 if params.mask_blur is None else params.mask_blur,
        fill=_FILLS[params.inpainting_fill or 0],
        only_masked=None if whole else params.inpaint_full_res_padding or 0,
    ), ignored


def _pixels(params: Txt2Img, context: DialectContext) -> tuple[int, int]:
    """Return checked width and height; the size of the response depends on them. Raises `InvalidInput`."""
    sides = {
        "width": 512 if params.width is None else params.width,
        "height": 512 if params.height is None else params.height,
    }
    low, high = context.limits.bounds()["width"]
    faults = [(n, f"{n} must be between {low:g} and {high:g}.") for n, side in sides.items() if not low <= side <= high]
    if faults:
        raise InvalidInput.from_faults(faults)
    return sides["width"], sides["height"]


def _text(settings: dict[str, Any], name: str) -> str:
    """Return a text option, an empty text if it is omitted or null. Raises `InvalidInput`."""
    value = settings.get(name)
    if value is not None and not (isinstance(value, str) and len(value) <= NAME_MAX):
        raise InvalidInput(f"{name} must be a text of up to {NAME_MAX} characters.", field="override_settings")
    return value or ""


def _format(settings: dict[str, Any]) -> Format:
    wanted = (_text(settings, "samples_format") or "png").lower()
    if wanted not in FORMATS:
        raise InvalidInput("samples_format must be png, jpg or webp.", field="override_settings")
    return FORMATS[wanted]


def _ignored_parameters(params: Txt2Img, settings: dict[str, Any]) -> list[str]:
    """Return sentences about parameters that this server ignores."""
    ignored = [
        f"{name[:50]} is not honoured."
        for name, value in (params.model_extra or {}).items()
        if value not in (None, "", [], {}) and value not in _NEUTRAL.get(name, ()) and not name.startswith(_SILENT)
    ]
    return [
        *ignored,
        *(f"override_settings: {name[:50]} is not honoured." for name in settings if name not in _KNOWN_SETTINGS),
    ]
