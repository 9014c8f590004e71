"""What AUTOMATIC1111's txt2img and img2img take, turned into orders; what cannot be honoured is told."""

from __future__ import annotations

from dataclasses import dataclass, replace
from secrets import randbelow
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from stable_diffusion_server.api.automatic1111.controlnet_units import CannyUnit, edges_in
from stable_diffusion_server.api.automatic1111.name_mapping import model_named, scheduler_for
from stable_diffusion_server.api.automatic1111.prompt_syntax import adapters_in, unread_in
from stable_diffusion_server.api.base64_images import bytes_of
from stable_diffusion_server.api.dialect_context import DialectContext
from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.generation import NAME_MAX
from stable_diffusion_server.types import SEED_MAX, Fill, Fit, Format, GenerationRequest, ImageInput, Task

_FITS = (Fit.STRETCH, Fit.CROP, Fit.PAD, Fit.STRETCH)
_FILLS = (Fill.SURROUNDINGS, Fill.ORIGINAL, Fill.NOISE, Fill.GREY)
_FORMATS = {"png": Format.PNG, "jpg": Format.JPEG, "jpeg": Format.JPEG, "webp": Format.WEBP}
# Known, and of no use here, by the values at which they ask for nothing.
_IDLE: dict[str, tuple[object, ...]] = {
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
_ANYTHING = (
    "sampler_index",
    "denoising_strength",
    "do_not_save_samples",
    "do_not_save_grid",
    "save_images",
    "hr_",
    "comments",
    "infotext",
)
_SETTINGS = {"sd_model_checkpoint", "samples_format"}
_MARGIN_MAX = 2048
# Characters of a prompt that may be tags, beside MAX_PROMPT_CHARACTERS of words.
_TAGS_MAX = 1000
# Sentences about what is not honoured; the first tell enough.
_MOST_TOLD = 100


class Txt2Img(BaseModel):
    """Parameters of text to image. What is not named here is taken, and told where it asks for something."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False, strict=True)

    # Names that may hold pictures, in base64.
    pictures: ClassVar[frozenset[str]] = frozenset({"alwayson_scripts"})

    prompt: str = Field(
        "", description="What to draw; `<lora:name:0.8>` draws with an adapter.", examples=["a red circle"]
    )
    negative_prompt: str | None = Field(None, description="What not to draw.")
    seed: int | None = Field(None, ge=-1, le=SEED_MAX, description="-1, or none: a new one. Further pictures count on.")
    steps: int | None = Field(None, description="Denoising steps.")
    cfg_scale: float | None = Field(None, description="How strongly to follow the prompt.")
    width: int | None = Field(None, description="Width in pixels; 512 unless said.")
    height: int | None = Field(None, description="Height in pixels; 512 unless said.")
    sampler_name: str | None = Field(
        None, max_length=NAME_MAX, description="A name of `/sdapi/v1/samplers`, or one close to them."
    )
    sampler_index: str | None = Field(None, max_length=NAME_MAX, description="The same, as older clients have it.")
    scheduler: str | None = Field(
        None, max_length=NAME_MAX, description="Spacing of the steps; told in `info` where it is not honoured."
    )
    batch_size: int | None = Field(None, ge=1, description="Pictures in a batch.")
    n_iter: int | None = Field(None, ge=1, description="Batches.")
    override_settings: dict[str, Any] | None = Field(None, description="`sd_model_checkpoint` and `samples_format`.")
    alwayson_scripts: dict[str, Any] | None = Field(None, description="A ControlNet unit of canny.")
    send_images: bool | None = Field(None, description="False: the answer holds no pictures, `info` their addresses.")
    force_task_id: str | None = Field(None, max_length=200, description="The name to ask `progress` by.")

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

    init_images: list[str] | None = Field(None, description="The picture to start from, in base64; the first counts.")
    resize_mode: int | None = Field(None, ge=0, le=3, description="0 stretch, 1 crop, 2 pad to width and height.")
    denoising_strength: float | None = Field(None, description="How much is drawn anew, 0 to 1; 0.75 unless said.")
    mask: str | None = Field(None, description="White where to repaint, in base64.")
    mask_blur: int | None = Field(None, description="Pixels over which the repainted part fades in.")
    inpainting_fill: int | None = Field(None, ge=0, le=3, description="0 surroundings, 1 original, 2 noise, 3 grey.")
    inpaint_full_res: bool | int | None = Field(None, description="Draw only what is around the mask, at full size.")
    inpaint_full_res_padding: int | None = Field(None, ge=0, le=_MARGIN_MAX, description="Its margin in pixels.")
    inpainting_mask_invert: int | None = Field(None, ge=0, le=1, description="1: black is repainted.")


@dataclass(frozen=True, slots=True)
class ParsedTask:
    """The orders of a request, one for each picture, and sentences about what of it is not honoured."""

    orders: list[GenerationRequest]
    told: list[str]


def parse_task(asked: Txt2Img, house: DialectContext, model: str | None) -> ParsedTask:
    """The orders of a request; `model` is the caller's, unless the request names one. Raises `InvalidInput`."""
    longest = house.limits.max_prompt_characters + _TAGS_MAX
    if len(asked.prompt) > longest:
        raise InvalidInput(f"prompt must not be longer than {longest} characters, tags included.", field="prompt")
    settings = asked.override_settings or {}
    named = _text(settings, "sd_model_checkpoint")
    own = model_named(named, house) if named else model
    facts = house.facts(own)
    scheduler, about_scheduler = scheduler_for(
        asked.sampler_name or asked.sampler_index or "", asked.scheduler or "", facts
    )
    edges, about_scripts = edges_in(asked.alwayson_scripts or {})
    prompt, loras = adapters_in(asked.prompt)
    count = (asked.batch_size or 1) * (asked.n_iter or 1)
    if count > house.max_n:
        raise InvalidInput(f"batch_size × n_iter must not be more than {house.max_n}.", field="batch_size")
    width, height = _pixels(asked, house)
    house.check_size(count, width, height, "batch_size")
    order = GenerationRequest(
        task=Task.TEXT_TO_IMAGE,
        prompt=prompt,
        width=width,
        height=height,
        model=own,
        negative_prompt=asked.negative_prompt or None,
        seed=randbelow(SEED_MAX + 1) if asked.seed in (None, -1) else asked.seed,
        num_inference_steps=asked.steps,
        guidance_scale=asked.cfg_scale,
        scheduler=scheduler,
        format=_format(settings),
        loras=loras,
    )
    told = [*filter(None, [about_scheduler]), *about_scripts, *unread_in(asked.prompt), *_unheard(asked, settings)]
    order, about_pictures = _with_pictures(order, asked, edges)
    told = [*told, *about_pictures][:_MOST_TOLD]
    return ParsedTask([replace(order, variation=number) for number in range(count)], told)


def _with_pictures(
    order: GenerationRequest, asked: Txt2Img, edges: CannyUnit | None
) -> tuple[GenerationRequest, list[str]]:
    told: list[str] = []
    if edges is not None:
        order = replace(order, canny=True, canny_low=edges.low, canny_high=edges.high, control_scale=edges.weight)
    if not isinstance(asked, Img2Img):
        if edges is None:
            return order, told
        if not edges.image:
            raise InvalidInput("A ControlNet unit needs its image here.", field="alwayson_scripts")
        # Control alone: nothing of the picture but its edges.
        image = ImageInput("alwayson_scripts", data=bytes_of(edges.image, "alwayson_scripts"))
        return replace(order, task=Task.IMAGE_TO_IMAGE, image=image, strength=1.0), told
    if not asked.init_images:
        raise InvalidInput("init_images must hold a picture in base64.", field="init_images")
    data = bytes_of(asked.init_images[0], "init_images")
    if len(asked.init_images) > 1:
        told.append("init_images: the first is taken.")
    if edges is not None and edges.image and bytes_of(edges.image, "alwayson_scripts") != data:
        told.append("controlnet: the edges are those of the picture to draw anew.")
    order = replace(
        order,
        task=Task.IMAGE_TO_IMAGE,
        image=ImageInput("init_images", data=data),
        fit=_FITS[asked.resize_mode or 0],
        strength=0.75 if asked.denoising_strength is None else asked.denoising_strength,
    )
    if not asked.mask:
        return order, told
    if edges is not None:
        told.append("controlnet: edges are not followed where a mask is.")
    whole = asked.inpaint_full_res is not None and not asked.inpaint_full_res
    return replace(
        order,
        task=Task.INPAINT,
        canny=False,
        mask=ImageInput("mask", data=bytes_of(asked.mask, "mask"), inverted=asked.inpainting_mask_invert == 1),
        feather=4 if asked.mask_blur is None else asked.mask_blur,
        fill=_FILLS[asked.inpainting_fill or 0],
        only_masked=None if whole else asked.inpaint_full_res_padding or 0,
    ), told


def _pixels(asked: Txt2Img, house: DialectContext) -> tuple[int, int]:
    """The size asked for, checked here because it is counted with before the order is. Raises `InvalidInput`."""
    sides = {
        "width": 512 if asked.width is None else asked.width,
        "height": 512 if asked.height is None else asked.height,
    }
    low, high = house.limits.bounds()["width"]
    faults = [(n, f"{n} must be between {low:g} and {high:g}.") for n, side in sides.items() if not low <= side <= high]
    if faults:
        raise InvalidInput.from_faults(faults)
    return sides["width"], sides["height"]


def _text(settings: dict[str, Any], name: str) -> str:
    """An option that is a text; one that is left out, or null, is empty. Raises `InvalidInput`."""
    value = settings.get(name)
    if value is not None and not (isinstance(value, str) and len(value) <= NAME_MAX):
        raise InvalidInput(f"{name} must be a text of up to {NAME_MAX} characters.", field="override_settings")
    return value or ""


def _format(settings: dict[str, Any]) -> Format:
    wanted = (_text(settings, "samples_format") or "png").lower()
    if wanted not in _FORMATS:
        raise InvalidInput("samples_format must be png, jpg or webp.", field="override_settings")
    return _FORMATS[wanted]


def _unheard(asked: Txt2Img, settings: dict[str, Any]) -> list[str]:
    """Sentences about parameters that ask for something this server does not do."""
    told = [
        f"{name[:50]} is not honoured."
        for name, value in (asked.model_extra or {}).items()
        if value not in (None, "", [], {}) and value not in _IDLE.get(name, ()) and not name.startswith(_ANYTHING)
    ]
    return [*told, *(f"override_settings: {name[:50]} is not known." for name in settings if name not in _SETTINGS)]
