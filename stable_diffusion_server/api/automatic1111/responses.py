"""Responses of AUTOMATIC1111's API."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated

from pydantic import Field
from typing_extensions import TypedDict  # pydantic rejects typing.TypedDict before Python 3.12

from stable_diffusion_server.api.automatic1111.checkpoint_names import title_of
from stable_diffusion_server.api.automatic1111.generation_info import TaskImage, generation_info
from stable_diffusion_server.api.automatic1111.progress import TrackedTask
from stable_diffusion_server.api.automatic1111.protocol import ParsedTask
from stable_diffusion_server.api.automatic1111.sampler_names import SAMPLERS, default_options, samplers_of
from stable_diffusion_server.api.base64_images import text_of
from stable_diffusion_server.api.dependencies import DialectContext
from stable_diffusion_server.imaging import parameters_text, parse_parameters, read_parameters_text, read_record
from stable_diffusion_server.parsing import dumps

_LONG_FIELDS = ("init_images", "mask", "alwayson_scripts")


class Automatic1111ImagesBody(TypedDict):
    """Images in base64. `info` is JSON in a text: how they were made, and what was ignored."""

    images: list[str]
    parameters: dict[str, object]
    info: str


class Automatic1111StateBody(TypedDict):
    """State of a task, as AUTOMATIC1111 reports it."""

    skipped: bool
    interrupted: bool
    stopping_generation: bool
    job: str
    job_count: int
    job_timestamp: str
    job_no: int
    sampling_step: int
    sampling_steps: int


class Automatic1111ProgressBody(TypedDict):
    """Progress of the caller's oldest task, 0 without a task. `current_image` is a PNG in base64."""

    progress: Annotated[float, Field(ge=0, le=1)]
    eta_relative: float
    state: Automatic1111StateBody
    current_image: str | None
    textinfo: str | None


class Automatic1111TaskProgressBody(TypedDict):
    """Progress of one task. `live_preview` is a data URL."""

    active: bool
    queued: bool
    completed: bool
    progress: float | None
    eta: float | None
    live_preview: str | None
    id_live_preview: int
    textinfo: str | None


class Automatic1111ModelBody(TypedDict):
    """A model."""

    title: str
    model_name: str
    hash: str | None
    sha256: str | None
    filename: str
    config: str | None


class Automatic1111SamplerBody(TypedDict):
    """A sampler."""

    name: str
    aliases: list[str]
    options: dict[str, object]


class Automatic1111LoraBody(TypedDict):
    """A LoRA."""

    name: str
    alias: str
    path: str
    metadata: dict[str, object]


class Automatic1111PngInfoBody(TypedDict):
    """How an image says it was made: as text, and its parts by name."""

    info: str
    items: dict[str, object]
    parameters: dict[str, object]


def images_body(
    parsed: ParsedTask, images: Sequence[TaskImage], maps: Sequence[bytes], began: float, *, interrupted: bool
) -> Automatic1111ImagesBody:
    """Return the images and then the detected maps, the parameters, and the metadata as JSON in a text.

    `began` is the time of the request, in seconds since 1970.
    """
    parameters = parsed.params.model_dump(exclude=set(_LONG_FIELDS))
    shown = parsed.params.send_images is not False
    return {
        "images": [text_of(file) for file in (*(image.file for image in images), *maps)] if shown else [],
        "parameters": {name[:100]: value for name, value in parameters.items()},
        "info": dumps(generation_info(parsed, images, began, interrupted=interrupted)),
    }


def progress_body(tasks: Sequence[TrackedTask], preview: str | None) -> Automatic1111ProgressBody:
    """Return the progress of a caller's oldest task, 0 of 0 without one. `preview` is a PNG in base64."""
    task = tasks[0] if tasks else None
    image = task.current if task else None
    return {
        "progress": round(min(task.fraction, 0.99), 4) if task else 0.0,
        "eta_relative": round(task.eta_seconds or 0.0, 2) if task else 0.0,
        "state": {
            "skipped": False,
            "interrupted": bool(task and task.interrupted),
            "stopping_generation": False,
            "job": task.name if task else "",
            "job_count": len(task.images) if task else 0,
            "job_timestamp": time.strftime("%Y%m%d%H%M%S", time.gmtime(task.began)) if task else "0",
            "job_no": sum(one.done for one in task.images) if task else 0,
            "sampling_step": image.step if image else 0,
            "sampling_steps": image.steps if image else 0,
        },
        "current_image": preview,
        "textinfo": None if task is None else "Drawing" if image and image.started else "Waiting",
    }


def task_progress_body(task: TrackedTask | None, preview: str | None) -> Automatic1111TaskProgressBody:
    """Return the progress of one task, as AUTOMATIC1111's own page reads it."""
    started = bool(task and any(one.started for one in task.images))
    return {
        "active": started,
        "queued": task is not None and not started,
        "completed": task is None,
        "progress": round(task.fraction, 4) if task else None,
        "eta": task.eta_seconds if task else None,
        "live_preview": None if preview is None else f"data:image/png;base64,{preview}",
        "id_live_preview": task.current.step if task else -1,
        "textinfo": None,
    }


def models_body(context: DialectContext) -> list[Automatic1111ModelBody]:
    """List the models."""
    return [
        {
            "title": title_of(spec),
            "model_name": spec.name,
            "hash": spec.revision,
            "sha256": None,
            "filename": spec.folder,
            "config": None,
        }
        for spec in context.models.values()
    ]


def samplers_body(context: DialectContext) -> list[Automatic1111SamplerBody]:
    """List the samplers that have an exact counterpart here."""
    return [
        {"name": name, "aliases": [SAMPLERS[name][0]], "options": default_options(name)}
        for name in samplers_of(context.models)
    ]


def loras_body(context: DialectContext) -> list[Automatic1111LoraBody]:
    """List the LoRAs."""
    return [{"name": name, "alias": name, "path": name, "metadata": {}} for name in sorted(context.loras())]


def png_info_body(file: bytes) -> Automatic1111PngInfoBody:
    """Return an image's metadata: this server's record, or the text that AUTOMATIC1111 writes into PNG."""
    record = read_record(file)
    text = parameters_text(record) if record is not None else read_parameters_text(file)
    items: dict[str, object] = {"parameters": text, **({"record": dumps(record)} if record is not None else {})}
    return {"info": text, "items": items if text else {}, "parameters": dict(parse_parameters(text))}
