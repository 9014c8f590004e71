"""Load a pipeline's parts once, from files on disk only; make schedulers and token counters from them."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import Any

import diffusers
import torch
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from stable_diffusion_server.errors import WeightsUnusable
from stable_diffusion_server.pipelines.catalog import ModelFacts, SchedulerFacts


def choose_device(name: str) -> torch.device:
    """The torch device of that name; `auto` takes CUDA, then MPS, then the CPU.

    Raises `WeightsUnusable` in one sentence when the machine has no such device.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, there in available.items() if there))
    device = torch.device(name)
    if not available[device.type] or (device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()):
        raise WeightsUnusable(f"DEVICE={name} was asked for, and this machine has no such device.")
    return device


def load_pipeline(facts: ModelFacts, models_dir: Path, device: torch.device) -> Any:
    """The stock diffusers pipeline of a model, fp32, on `device`. Never reaches for a network.

    Raises `WeightsUnusable` when files are missing, damaged or of another class.
    """
    folder = models_dir / facts.folder
    index = folder / "model_index.json"
    if not index.is_file():
        raise WeightsUnusable(f"The model {facts.name} is missing: no {index.name} in {facts.folder}.")
    quieten_libraries()
    try:
        found = json.loads(index.read_text()).get("_class_name")
        if found != facts.pipeline_class:
            raise WeightsUnusable(f"{facts.folder} holds a {found}, and {facts.name} needs a {facts.pipeline_class}.")
        pipeline = getattr(diffusers, facts.pipeline_class).from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, use_safetensors=True
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise WeightsUnusable(f"The files in {facts.folder} cannot be loaded ({type(error).__name__}).") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def load_controlnet(facts: ModelFacts, models_dir: Path, device: torch.device) -> Any:
    """The model's ControlNet for edges on `device`; `None` when its folder is not there.

    Raises `WeightsUnusable` when files are missing, damaged or of another class.
    """
    if facts.control_folder is None or not (models_dir / facts.control_folder).is_dir():
        return None
    folder = models_dir / facts.control_folder
    try:
        found = json.loads((folder / "config.json").read_text()).get("_class_name")
        if found != facts.control_class:
            raise WeightsUnusable(f"{facts.control_folder} holds a {found}, and a {facts.control_class} is needed.")
        network = getattr(diffusers, facts.control_class).from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, use_safetensors=True
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise WeightsUnusable(f"The files in {folder.name} cannot be loaded ({type(error).__name__}).") from error
    return network.to(device)


def quieten_libraries() -> None:
    """Keep the libraries' bars and remarks on optional packages off the console; errors still show."""
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


def make_scheduler(facts: SchedulerFacts, like: Any) -> Any:
    """A fresh scheduler of a kind, with the training facts (betas, prediction type …) of the model's own one.

    Carries `draws_noise`: whether its `step` takes a generator.
    """
    kind = getattr(diffusers, facts.class_name)
    scheduler = kind.from_config(like.config, **facts.options)
    scheduler.draws_noise = "generator" in inspect.signature(scheduler.step).parameters
    return scheduler


def set_timesteps(scheduler: Any, steps: int, device: torch.device) -> None:
    """Give a scheduler just `steps` timesteps.

    Counting down from 1000 by fractions, diffusers' trailing spacing sometimes (61 steps, for one) adds a timestep of
    −1 at the end, which is none; it and its sigma are taken away.
    """
    scheduler.set_timesteps(steps, device=device)
    if len(scheduler.timesteps) == steps + 1 and scheduler.timesteps[-1] < 0:
        scheduler.timesteps = scheduler.timesteps[:-1]
        if hasattr(scheduler, "sigmas"):
            scheduler.sigmas = torch.cat([scheduler.sigmas[:-2], scheduler.sigmas[-1:]])


def token_counter(tokenizer: Any) -> Callable[[str], int]:
    """A function that counts a text's tokens, special ones included, on a copy of `tokenizer` of its own.

    The copy and the lock are needed: fast tokenizers keep truncation settings inside and are not shared by threads.
    """
    own, lock = copy.deepcopy(tokenizer), Lock()
    # Counting texts that are too long is the very purpose, so its warning about them says nothing.
    own.model_max_length = int(1e9)

    def count(text: str) -> int:
        with lock:
            return len(own(text, truncation=False).input_ids)

    return count
