"""Builds schedulers and token counters from a pipeline's own ones."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any

import diffusers
import torch

from stable_diffusion_server.pipelines import own_schedulers
from stable_diffusion_server.pipelines.loading.schedules import configuration
from stable_diffusion_server.pipelines.model_spec import SchedulerSpec
from stable_diffusion_server.types import ExtraValue


def make_scheduler(spec: SchedulerSpec, like: Any, sampling: Sequence[tuple[str, ExtraValue]] = ()) -> Any:
    """A new scheduler with the training configuration (betas, prediction type …) of the model's own one.

    Without a class it is of the class of the model's own. `sampling` are a request's options. Its attribute
    `draws_noise` says whether `step` takes a generator, `step_options` are further arguments of `step`.
    """
    chosen = dict(sampling)
    scheduler_class = type(like)
    if spec.class_name:
        scheduler_class = getattr(own_schedulers, spec.class_name, None) or getattr(diffusers, spec.class_name)
    options = {**spec.options, **configuration(scheduler_class, like, chosen, pure=spec.start_pure)}
    scheduler = scheduler_class.from_config(like.config, **options)
    parameters = inspect.signature(scheduler.step).parameters
    scheduler.draws_noise = "generator" in parameters
    # The stock pipelines pass it too; TCD's own default is 0.3.
    scheduler.step_options = {"eta": 0.0} if "eta" in parameters else {}
    scheduler.step_options |= {name: chosen[name] for name in spec.takes if name in chosen and name in parameters}
    if isinstance(scheduler, own_schedulers.EulerAncestralScheduler | own_schedulers.DPM2SAncestralScheduler):
        scheduler.eta = float(chosen.get("eta", scheduler.eta))
    return scheduler


def set_timesteps(scheduler: Any, steps: int, device: torch.device, timesteps: Sequence[int] = ()) -> None:
    """Give a scheduler the timesteps of exactly `steps` steps, or those that a table has.

    diffusers' trailing spacing subtracts fractions from 1000; for some counts (61, for example) rounding adds a step
    with a timestep of −1 at the end. It is removed with its sigmas.
    """
    if timesteps:
        scheduler.set_timesteps(timesteps=[*timesteps], device=device)
        return
    scheduler.set_timesteps(steps, device=device)
    # The last step of second order has one pass; PNDM takes its second timestep twice.
    passes = 2 * steps - 1 if scheduler.order == 2 else steps + isinstance(scheduler, diffusers.PNDMScheduler)
    surplus = len(scheduler.timesteps) - passes
    if surplus > 0 and scheduler.timesteps[-1] < 0:
        scheduler.timesteps = scheduler.timesteps[:-surplus]
        if hasattr(scheduler, "sigmas"):
            scheduler.sigmas = torch.cat([scheduler.sigmas[: -surplus - 1], scheduler.sigmas[-1:]])


def token_counter(tokenizer: Any) -> Callable[[str], int]:
    """A thread-safe function that counts a text's tokens, special ones included.

    It uses a copy of `tokenizer` and a lock: fast tokenizers keep truncation settings inside and are not thread-safe.
    """
    lock = Lock()
    if hasattr(tokenizer, "_tokenizer"):  # the words that it was made of are lists of 100,000 objects, never changed
        own = copy.copy(tokenizer)
        own._tokenizer = copy.deepcopy(tokenizer._tokenizer)
    else:
        own = copy.deepcopy(tokenizer)
    own.model_max_length = int(1e9)  # avoids warnings about long texts, which this counter exists to find

    def count(text: str) -> int:
        with lock:
            return len(own(text, truncation=False).input_ids)

    return count


def chat_counter(tokenizer: Any, *, thinking: bool) -> Callable[[str], int]:
    """A thread-safe function that counts a prompt's tokens as a message in the tokenizer's chat template.

    Without `thinking`, the template of Qwen3 adds an empty block of thoughts to the message.
    """
    count = token_counter(tokenizer)

    def in_chat(prompt: str) -> int:
        messages = [{"role": "user", "content": prompt}]
        given = {"add_generation_prompt": True, "enable_thinking": thinking}
        return count(tokenizer.apply_chat_template(messages, tokenize=False, **given))

    return in_chat
