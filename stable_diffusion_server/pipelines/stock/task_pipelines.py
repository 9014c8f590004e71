"""The pipeline of each task over the components of a loaded one, and an object of it for each request."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import diffusers
from diffusers.pipelines import auto_pipeline

from stable_diffusion_server.types import Task

_TABLES = {
    Task.IMAGE_TO_IMAGE: auto_pipeline.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING,
    Task.INPAINT: auto_pipeline.AUTO_INPAINT_PIPELINES_MAPPING,
}
_ENDINGS = {Task.IMAGE_TO_IMAGE: "Img2ImgPipeline", Task.INPAINT: "InpaintPipeline"}
# What the call of a task must take.
_NEEDED = {
    Task.TEXT_TO_IMAGE: {"prompt"},
    Task.IMAGE_TO_IMAGE: {"prompt", "image", "strength"},
    Task.INPAINT: {"prompt", "image", "mask_image", "strength"},
    Task.EDIT: {"prompt", "image"},
}
# Broken as shipped in diffusers 0.42: it reads `guidance_embeds`, which Chroma's configuration lacks.
_BROKEN = frozenset({"ChromaInpaintPipeline"})


def task_class(pipeline_class: type, task: Task) -> type | None:
    """The class that draws a task with the components of `pipeline_class`; `None` if there is none."""
    if task in (Task.TEXT_TO_IMAGE, Task.EDIT):
        found: Any = pipeline_class
    else:
        keys = [
            key for key, known in auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING.items() if known is pipeline_class
        ]
        keys += [key for key, known in _TABLES[Task.IMAGE_TO_IMAGE].items() if known is pipeline_class]
        listed = (_TABLES[task].get(key) for key in keys)
        beside = getattr(diffusers, pipeline_class.__name__.removesuffix("Pipeline") + _ENDINGS[task], None)
        found = next((one for one in (*listed, beside) if one is not None and _takes(one, task)), None)
    return found if found is not None and _takes(found, task) and found.__name__ not in _BROKEN else None


def _takes(pipeline_class: type, task: Task) -> bool:
    return inspect.signature(pipeline_class.__call__).parameters.keys() >= _NEEDED[task]


def over_components(pipeline: Any, pipeline_class: type) -> Any:
    """A pipeline of another class over the same components and configuration; not `from_pipe`, which casts weights."""
    if type(pipeline) is pipeline_class:
        return pipeline
    known = {**pipeline.config, **pipeline.components}
    wanted = inspect.signature(pipeline_class).parameters
    made: Any = pipeline_class(**{name: known[name] for name in wanted if name in known})
    made.set_progress_bar_config(disable=True)
    return made


def for_request(pipeline: Any) -> Any:
    """A shallow copy with its own scheduler, since a call keeps its state in the object and in the scheduler."""
    own = copy.copy(pipeline)
    own.__dict__.pop("_num_timesteps", None)  # of an earlier call
    own.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    # It would add offload hooks to all components after each call; the registry moves the weights.
    own.maybe_free_model_hooks = lambda: None
    return own
