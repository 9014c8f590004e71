"""Catalogue types: the specification of a model and of a scheduler."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class SchedulerSpec:
    """A scheduler: its diffusers class, the configuration options it overrides, and the steps it takes."""

    class_name: str
    min_steps: int = 1
    max_steps: int = 1000
    options: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One row of the catalogue: everything the server knows of a model before it loads it.

    `name` is the family's name in requests, `family` the import path (`module:Class`) of its family class.
    `folder` and `control_folder` lie in MODELS_DIR; `repo` and `control_repo` are their Hugging Face repositories.

    `native_pixels` is the largest area at which images are good and `min_side` the shortest side, both in pixels.
    `text_tokens` is the prompt length in tokens, special tokens included. `bumpy_redraws` is how often an image with
    artifacts is generated again. `rounds_steps_up` says how strength × steps is rounded (see `steps_skipped`).
    `builtin_loras` are LoRAs that belong to the model, as (folder, weight).

    `revision` identifies the weights in digests and metadata. `weights` and `control_weights` are the SHA-256 digests
    of the files the revision stands for; for other files `with_weights` adds their digest to the revision.

    `dtype` and `cpu_dtype` name the torch dtype on an accelerator and on the CPU, `variant` the preferred weight files,
    `denoiser_part` the pipeline component that predicts the noise, and `quantizable_parts` the components that
    QUANTIZE converts. `takes_controlnet_lora` and `takes_dfloat11` say whether CONTROLNET_LORA and DF11_MODEL_PATH
    apply to the model.
    """

    name: str
    family: str
    folder: str
    pipeline_class: str
    revision: str
    native_pixels: int
    min_side: int
    text_tokens: int
    default_steps: int
    default_guidance: float
    default_scheduler: str
    schedulers: tuple[str, ...]
    takes_negative_prompt: bool
    takes_guidance: bool = True
    takes_controlnet_lora: bool = False
    takes_dfloat11: bool = False
    bumpy_redraws: int = 0
    lowercase_prompts: bool = False
    weights: str = ""
    control_weights: str = ""
    control_revision: str = ""
    rounds_steps_up: bool = False
    control_folder: str | None = None
    control_class: str = "ControlNetModel"
    control_scale: float = 0.5
    repo: str | None = None
    control_repo: str | None = None
    lcm_folder: str | None = None
    lcm_repo: str | None = None
    builtin_loras: tuple[tuple[str, float], ...] = ()
    dtype: str = "float32"
    cpu_dtype: str = "float32"
    variant: str | None = None
    denoiser_part: str = "unet"
    quantizable_parts: tuple[str, ...] = ("unet", "control")

    def revision_for(self, *, edges: bool) -> str:
        """The revision for an image: that of the weights, plus that of the ControlNet when it follows edges."""
        return f"{self.revision}+edges-{self.control_revision}" if edges and self.control_revision else self.revision
