"""Which family answers a job: loads every family and hands each state to its own. The only door for `app`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from stable_diffusion_server.orders import Job
from stable_diffusion_server.pipelines.catalog import MODELS, ModelFacts
from stable_diffusion_server.pipelines.components import (
    choose_device,
    load_controlnet,
    load_pipeline,
    quieten_libraries,
)
from stable_diffusion_server.pipelines.denoising import Drawn, Family, State


class Registry:
    """All loaded families behind one face: what the engine calls its denoiser."""

    def __init__(self, families: Mapping[str, Family]) -> None:
        self._families = families

    def prepare(self, job: Job) -> State[Any]:
        """The job's state before its first step."""
        return self._families[job.model].prepare(job)

    def step(self, states: Sequence[State[Any]]) -> None:
        """One denoising step for states of one shape, and so of one family."""
        self._families[states[0].job.model].step(states)

    def finish(self, state: State[Any]) -> Drawn:
        """The picture of a state that is done."""
        return self._families[state.job.model].finish(state)

    def count_tokens(self, model: str, prompt: str) -> int:
        """Length of a prompt in a model's tokens. Safe from any thread."""
        return self._families[model].count_tokens(prompt)


def load(models_dir: Path, device_name: str, cpu_threads: int) -> Registry:
    """Load every model of the catalogue on one device. Raises `WeightsUnusable` with a sentence saying why not.

    Call it on the thread that will draw: PyTorch's number of threads is set for it.
    """
    if cpu_threads:
        torch.set_num_threads(cpu_threads)
    device = choose_device(device_name)
    kinds = _kinds()
    return Registry(
        {
            name: kinds[facts.pipeline_class](
                load_pipeline(facts, models_dir, device), facts, load_controlnet(facts, models_dir, device)
            )
            for name, facts in MODELS.items()
        }
    )


def _kinds() -> Mapping[str, Callable[[Any, ModelFacts, Any], Family]]:
    """Each family by the stock pipeline it draws with."""
    quieten_libraries()
    # Imported behind it: what they bring along remarks on packages that are not needed here.
    from stable_diffusion_server.pipelines.flux import Flux
    from stable_diffusion_server.pipelines.sdxl import Sdxl

    return {"StableDiffusionXLPipeline": Sdxl, "FluxPipeline": Flux}
