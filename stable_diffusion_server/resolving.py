"""An order becomes a plan: everything that can be decided without a device or a bucket. Pure but for `seed=random`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from secrets import randbelow
from typing import TypeVar

from stable_diffusion_server.bucket_api import object_key
from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.image_processing import Canvas, plan_canvas
from stable_diffusion_server.orders import (
    SEED_MAX,
    Format,
    Job,
    Limits,
    Order,
    Warned,
    digest,
    job_facts,
    picture_digest,
)
from stable_diffusion_server.pipelines.catalog import ModelFacts, facts_of, scheduler_of
from stable_diffusion_server.prompts import clean

T = TypeVar("T")

DEFAULT_QUALITY = 85
_EXTENSIONS = {"webp": Format.WEBP, "png": Format.PNG, "jpg": Format.JPEG, "jpeg": Format.JPEG}
# Names that would promise a file this server does not make.
_OTHER_IMAGE_EXTENSIONS = frozenset("gif svg bmp tif tiff avif heic heif jxl ico pdf psd jp2 ppm tga".split())


@dataclass(frozen=True, slots=True)
class Options:
    """What the service was set up with. `embed_metadata` is full, digest or none."""

    limits: Limits
    default_model: str
    bucket_path: str
    embed_metadata: str = "full"


@dataclass(frozen=True, slots=True)
class Plan:
    """An order with everything decided that can be decided without a device.

    `content` is the identity of the picture at its size, `asked` that of the order with its seed left as asked.
    """

    order: Order
    job: Job
    facts: ModelFacts
    canvas: Canvas
    file_format: Format
    quality: int
    key: str
    content: str
    asked: str
    warnings: tuple[Warned, ...]

    @property
    def tag(self) -> str:
        """What exactly is to be stored under the key: orders of one tag share one effort."""
        return f"{self.content}/{self.file_format}/{self.quality}/{self.order.overwrite}"


def resolve(order: Order, options: Options) -> Plan:
    """Decide everything an order leaves open. Pure but for `seed=random`. Raises `InvalidInput`."""
    options.limits.check(order)
    facts = facts_of(order.model or options.default_model)
    warnings = []
    negative = _cleaned(order.negative_prompt or "", "negative_prompt") or None
    if negative and not facts.takes_negative_prompt:
        negative = None
        warnings.append(Warned("negative-prompt-ignored", f"{facts.name} has no use for a negative prompt."))
    prompt = _cleaned(order.prompt, "prompt")
    if not prompt:
        raise InvalidInput("prompt is empty.", field="prompt")
    canvas = plan_canvas(order.width, order.height, facts.native_pixels, facts.floor)
    if canvas.resampled:
        drawn = f"{canvas.width} × {canvas.height}"
        warnings.append(
            Warned("resampled", f"{facts.name} draws this best at {drawn}; it was scaled to the asked size.")
        )
    job = Job(
        task=order.task,
        model=facts.name,
        revision=facts.revision,
        prompt=prompt,
        negative_prompt=negative,
        width=canvas.width,
        height=canvas.height,
        seed=order.seed if isinstance(order.seed, int) else 0,
        num_inference_steps=_given(order.num_inference_steps, facts.default_steps),
        guidance_scale=_given(order.guidance_scale, facts.default_guidance),
        scheduler=_given(order.scheduler, facts.default_scheduler),
    )
    scheduler_of(facts, job.scheduler, job.num_inference_steps)
    size = {"width": order.width, "height": order.height}
    asked = digest({**job_facts(job), "asked": size, "seed": order.seed})
    if order.seed is None:
        job = replace(job, seed=int(asked[:8], 16))
    elif order.seed == "random":
        job = replace(job, seed=randbelow(SEED_MAX + 1))
    content = digest({"picture": picture_digest(job), **size})
    file_format = _file_format(order)
    quality = _given(order.quality, DEFAULT_QUALITY)
    name = order.save_path
    if name is None:
        name = f"{digest({'content': content, 'format': file_format, 'quality': quality})[:32]}.{file_format}"
    key = object_key(options.bucket_path, name)
    return Plan(order, job, facts, canvas, file_format, quality, key, content, asked, tuple(warnings))


def _given(value: T | None, default: T) -> T:
    return default if value is None else value


def _cleaned(text: str, field: str) -> str:
    try:
        return clean(text)
    except ValueError as error:
        raise InvalidInput(f"{field} {error}.", field=field) from error


def _file_format(order: Order) -> Format:
    """The format asked for, else the one the name's ending promises, else WebP. A contradiction is refused."""
    name = (order.save_path or "").rsplit("/", 1)[-1]
    ending = name.rsplit(".", 1)[1].lower() if "." in name else ""
    if ending in _OTHER_IMAGE_EXTENSIONS:
        raise InvalidInput(f"save_path ends in .{ending}; there are .webp, .png and .jpg.", field="save_path")
    promised = _EXTENSIONS.get(ending)
    if order.format and promised and order.format is not promised:
        raise InvalidInput(f"format is {order.format}, and save_path ends in .{ending}.", field="format")
    return order.format or promised or Format.WEBP
