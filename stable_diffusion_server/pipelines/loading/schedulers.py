"""Schedulers of a kind for a model, and their timesteps. Knows no jobs."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import torch

from stable_diffusion_server.pipelines.catalog import SchedulerSpec


def make_scheduler(facts: SchedulerSpec, like: Any) -> Any:
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
