"""The pipeline of each task over the components of a loaded one, and an object of it for each request."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import diffusers

from stable_diffusion_server.pipelines.stock.calls import STAGES

# HiDream draws every picture at an area of its own, the square of this attribute in latents.
_OWN_AREA, _WITHIN_FLOOR = "HiDreamImagePipeline", 1 + 1e-9


def over_components(pipeline: Any, class_name: str) -> Any:
    """A pipeline of another class over the same components and configuration; not `from_pipe`, which casts weights."""
    if type(pipeline).__name__ == class_name:
        return pipeline
    kind = getattr(diffusers, class_name)
    known = {**pipeline.config, **pipeline.components}
    wanted = inspect.signature(kind).parameters
    made: Any = kind(**{name: known[name] for name in wanted if name in known})
    made.set_progress_bar_config(disable=True)
    return made


def for_request(pipeline: Any, guidance: float | None = None, size: tuple[int, int] | None = None) -> Any:
    """A shallow copy with its own scheduler, since a call keeps its state in the object and in the scheduler.

    The copy of a modular pipeline has its own guider, by the scale `guidance` unless that is `None`. It draws `size`,
    width and height, also where the class would choose another one.
    """
    own = copy.copy(pipeline)
    own.__dict__.pop("_num_timesteps", None)  # of an earlier call
    own.scheduler = _new_scheduler(pipeline.scheduler)
    for name in STAGES:
        if hasattr(own, name):
            setattr(own, name, for_request(getattr(own, name)))
    if getattr(own, "guider", None) is not None and guidance is not None:
        own.guider = own.guider.new(guidance_scale=guidance)
    if size is not None and type(own).__name__ == _OWN_AREA:
        own.default_sample_size = (size[0] * size[1]) ** 0.5 / own.vae_scale_factor * _WITHIN_FLOOR
    if size is not None and hasattr(own, "resolutions"):  # those of Kandinsky 5
        own.resolutions = [size]
    # It would add offload hooks to all components after each call; the registry moves the weights.
    own.maybe_free_model_hooks = lambda: None
    return own


def _new_scheduler(like: Any) -> Any:
    """A scheduler of the same configuration; values that another class had by default are kept."""
    config = {name: value for name, value in like.config.items() if name != "_use_default_values"}
    return type(like).from_config(config)
