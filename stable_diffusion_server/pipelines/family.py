"""The interface of a model family, and the result of loading one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from stable_diffusion_server.pipelines.acceleration.cuda_graphs import CudaGraphRunner
from stable_diffusion_server.pipelines.base import DecodedImage, PipelineState
from stable_diffusion_server.pipelines.conditioning.prompt_cache import PromptCache
from stable_diffusion_server.pipelines.loading.loader import LoadOptions
from stable_diffusion_server.pipelines.loading.offload import OffloadedModel
from stable_diffusion_server.pipelines.loading.placement import Placement
from stable_diffusion_server.pipelines.model_spec import ModelSpec
from stable_diffusion_server.types import DiffusionRequest


class Family(Protocol):
    """A loaded model. All methods but `count_tokens` run on the engine's thread; states given to `step` share a shape.

    They raise `OutOfMemory` and `DeviceLost`; `finish` raises `NotFinite` too.
    """

    def prepare(self, request: DiffusionRequest) -> PipelineState[Any]:
        """Encode the prompt, make the latents, set the timesteps."""

    def step(self, states: Sequence[PipelineState[Any]]) -> None:
        """One denoising step for every state, in one forward pass."""

    def finish(self, state: PipelineState[Any]) -> DecodedImage:
        """Decode the latents; before the last step, the prediction of the final ones."""

    def preview(self, state: PipelineState[Any]) -> NDArray[np.uint8]:
        """A small image of the state, made without decoding: height × width × 3."""

    def shrink(self, state: PipelineState[Any]) -> bool:
        """Use less memory for this state from now on; false when it cannot."""

    def count_tokens(self, prompt: str) -> int:
        """Length of the prompt in the encoder's tokens, special tokens included. Thread-safe."""


@dataclass(frozen=True, slots=True)
class LoadedModelInfo:
    """A loaded model as `/readyz` describes it; `bytes` is the size of all its weights.

    `commit` is that of its hub repository, if it has one; `remarks` are sentences on what could not be loaded.
    `clip_widths` are the widths of its CLIPs, by part, if prompts may name embeddings.
    """

    name: str
    folder: str
    revision: str
    device: str
    dtype: str
    residency: str
    quantization: str
    bytes: int
    follows_edges: bool
    loras: tuple[str, ...]
    commit: str = ""
    remarks: tuple[str, ...] = ()
    clip_widths: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LoadedFamily:
    """A loaded family. `spec` has the revision of the files that were loaded.

    `prompt_cache`, `cuda_graphs` and `offloaded` are set if the family has them; the registry reports their size,
    clears the graphs and moves the weights. `networks` are its components with weights, by name. `token_counter` counts
    tokens as the family does, but does not hold the networks in memory. `placement` says what drawing takes.
    """

    family: Family
    spec: ModelSpec
    info: LoadedModelInfo
    prompt_cache: PromptCache | None = None
    cuda_graphs: Sequence[CudaGraphRunner] = ()
    offloaded: OffloadedModel | None = None
    networks: Mapping[str, torch.nn.Module] = field(default_factory=dict)
    token_counter: Callable[[str], int] | None = None
    placement: Placement | None = None


class FamilyClass(Protocol):
    """What the import path in a catalogue row (`ModelSpec.family`) leads to."""

    def load(self, spec: ModelSpec, models_dir: Path, device: torch.device, options: LoadOptions) -> LoadedFamily:
        """Load the model of `spec` and place it. Raises `ModelLoadError`, `ModelTooLarge` when it does not fit."""
