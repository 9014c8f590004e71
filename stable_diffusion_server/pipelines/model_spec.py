"""Catalogue types: the specification of a model and of a scheduler, and a table of models with aliases."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TypeVar

V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class SchedulerSpec:
    """A scheduler: its diffusers class, the configuration options it overrides, and the steps it takes."""

    class_name: str
    min_steps: int = 1
    max_steps: int = 1000
    options: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True, slots=True)
class CheckpointFiles:
    """The files of a model that is not a diffusers folder.

    `family` is `sdxl` or `flux`; `parts` are pairs of a part (`denoiser`, `vae`, `clip_l`, `clip_g`, `t5`) and its
    file's path within MODELS_DIR; a part that is not listed is in the denoiser's file. `tokenizer` is the place of T5's
    tokenizer, a folder or a GGUF file. `prediction` is `epsilon` or `v_prediction`; with `zero_snr` the schedule ends
    in pure noise.
    """

    family: str
    parts: tuple[tuple[str, str], ...]
    tokenizer: str = ""
    prediction: str = ""
    zero_snr: bool = False


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One row of the catalogue: everything the server knows of a model before it loads it.

    `name` is the family's name in requests, `family` the import path (`module:Class`) of its family class.
    `folder` and `control_folder` lie in MODELS_DIR; `repo` and `control_repo` are their Hugging Face repositories.

    `native_pixels` is the largest area at which images are good and `min_side` the shortest side, both in pixels.
    `text_tokens` is the prompt length in tokens, special tokens included. `bumpy_redraws` is how often an image with
    artifacts is generated again. `rounds_steps_up` says how strength × steps is rounded (see `steps_skipped`).
    `builtin_loras` are LoRAs that belong to the model, as (folder, weight). `guidance_rescale` (0..1) lessens the
    overexposure that guidance causes in models with zero terminal SNR. `clip_skip` layers of the text encoders more
    than usual are left out, `scheduler_options` change the configuration of the model's scheduler, and `quantize` and
    `offload` come before QUANTIZE and OFFLOAD unless they are empty. `checkpoint` lists the files of a model that is
    no diffusers folder; `folder` then is the name of the first of them.

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
    guidance_rescale: float = 0.0
    default_negative_prompt: str = ""
    clip_skip: int = 0
    scheduler_options: tuple[tuple[str, object], ...] = ()
    quantize: str = ""
    offload: str = ""
    checkpoint: CheckpointFiles | None = None
    quantizable_parts: tuple[str, ...] = ("unet", "control")

    def revision_for(self, *, edges: bool) -> str:
        """The revision for an image: that of the weights, plus that of the ControlNet when it follows edges."""
        return f"{self.revision}+edges-{self.control_revision}" if edges and self.control_revision else self.revision


def plain_name(name: str) -> str:
    """A name for comparing: composed Unicode, slashes, no blanks around it, without case."""
    return unicodedata.normalize("NFC", name.strip().replace("\\", "/").strip("/")).casefold()


class ModelTable(dict[str, V]):
    """Values by model name. `aliases` are further names of models: they are found, but not iterated over.

    A model of the name itself comes before an alias. Only `[]`, `get` and `in` know aliases, in any case and as
    `plain_name` compares them.
    """

    def __init__(
        self, values: Mapping[str, V] | Iterable[tuple[str, V]] = (), aliases: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(values)
        self.aliases = {plain_name(alias): name for alias, name in (aliases or {}).items()}

    def __missing__(self, name: str) -> V:
        target = self.aliases.get(plain_name(name))
        if target is None or target not in self.keys():
            raise KeyError(name)
        return dict.__getitem__(self, target)

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or super().__contains__(self.aliases.get(plain_name(str(name))))

    def get(self, name: str, default: V | None = None) -> V | None:  # type: ignore[override]  # one signature
        """The value of a model or alias."""
        return self[name] if name in self else default  # noqa: SIM401  # the suggested call is this method
