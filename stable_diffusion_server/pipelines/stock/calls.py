"""Runs the call of a pipeline object, and says where its loops open and each of their steps ends.

Ordinary pipelines call back and open a progress bar before their loop. Of modular ones, the blocks are walked: what is
before the loop, its sub-blocks once a step, and what comes after.
"""

from __future__ import annotations

import copy
import inspect
import operator
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from diffusers import ModularPipeline
from diffusers.modular_pipelines import LoopSequentialPipelineBlocks

from stable_diffusion_server.pipelines.stock.own_processors import OwnProcessors, Seams

# The pipelines inside of a combined one, in the order in which they run.
STAGES = ("prior_pipe", "decoder_pipe")
_PRIOR = "prior_callback_on_step_end"
# Parameters of classes that put attention of their own into the shared denoiser for the time of a call.
_SWAPS = frozenset({"pag_scale", "sag_scale"})


class RefusedByClass(ValueError):
    """A pipeline class refused the values of its call before it used them."""


def run_call(pipeline: Any, arguments: Mapping[str, Any], seams: Seams) -> Any:
    """What the call returns, the pictures first. The object must belong to this call alone."""
    if isinstance(pipeline, ModularPipeline):
        return _run_blocks(pipeline, arguments, seams)
    given, takes = dict(arguments), inspect.signature(type(pipeline).__call__).parameters
    own = (
        OwnProcessors(seams, getattr(pipeline, "unet", None) or pipeline.transformer) if takes.keys() & _SWAPS else None
    )
    seams = own or seams
    if "callback_on_step_end" in takes:
        given["callback_on_step_end"] = lambda _, index, __, tensors: _stepped(seams, index, tensors)
        given["callback_on_step_end_tensor_inputs"] = ["latents"]
    else:
        given |= {"callback": lambda index, _, latents: seams.stepped(index, latents), "callback_steps": 1}
    stages = [getattr(pipeline, name) for name in STAGES if hasattr(pipeline, name)] or [pipeline]
    if _PRIOR in takes:
        given[_PRIOR] = given["callback_on_step_end"]
    else:
        stages = stages[-1:]  # a prior that does not call back runs before the first step
    later = given["num_inference_steps"] if len(stages) > 1 else 0
    for number, stage in enumerate(stages, 1):
        stage.progress_bar = partial(
            _open_bar, seams, stage, stage.progress_bar, later if number < len(stages) else 0, []
        )
    if hasattr(pipeline, "check_inputs"):
        pipeline.check_inputs = partial(_checked, pipeline.check_inputs)
    try:
        return pipeline(**given)
    finally:
        pipeline.__dict__.pop("check_inputs", None)
        if own is not None:
            own.end()
        for stage in stages:
            stage.__dict__.pop("progress_bar", None)


def _checked(check: Callable[..., Any], *given: Any, **named: Any) -> Any:
    try:
        return check(*given, **named)
    except ValueError as error:
        raise RefusedByClass(str(error)) from error


def _stepped(seams: Seams, index: int, tensors: Mapping[str, Any]) -> dict[str, Any]:
    seams.stepped(index, tensors.get("latents"))
    return {}


def _open_bar(
    seams: Seams, stage: Any, bar: Any, later: int, opened: list[bool], iterable: Any = None, total: int | None = None
) -> Any:
    """The progress bar of a call, opened right before its loop: the seam between preparing and the first step."""
    if not opened:
        opened.append(True)
        listed = () if iterable is None else iterable  # a tensor of timesteps has no truth value
        seams.opened(getattr(stage, "_num_timesteps", None) or total or operator.length_hint(listed), later)
    return bar(iterable, total)


def _run_blocks(pipeline: Any, arguments: Mapping[str, Any], seams: Seams) -> Any:
    pipeline._blocks = _with_seams(pipeline.blocks, seams)
    return (pipeline(output="images", **arguments),)


def _with_seams(block: Any, seams: Seams) -> Any:
    """A copy of blocks whose loops say when a step begins and ends; those that hold no loop are shared."""
    if not getattr(block, "sub_blocks", None):
        return block
    own = copy.copy(block)
    if isinstance(block, LoopSequentialPipelineBlocks):
        own.loop_step = partial(_loop_step, seams, block.loop_step)
        own.set_progress_bar_config(disable=True)
        return own
    own.sub_blocks = type(block.sub_blocks)(
        (name, _with_seams(inner, seams)) for name, inner in block.sub_blocks.items()
    )
    return own


def _loop_step(seams: Seams, step: Any, components: Any, state: Any, **given: Any) -> Any:
    """One iteration of a loop: its sub-blocks, one after the other."""
    if given["i"] == 0:
        seams.opened(len(state.timesteps), 0)
    components, state = step(components, state, **given)
    seams.stepped(given["i"], getattr(state, "latents", None))
    return components, state
