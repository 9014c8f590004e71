"""Catalogue types: the specification of a model and of a scheduler, a table of models, and how names are compared."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Collection, ItemsView, Iterable, Iterator, KeysView, Mapping, Sequence, ValuesView
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TypeVar

from stable_diffusion_server.types import PromptSyntax, Task

V = TypeVar("V")

# The component of an SDXL pipeline that draws its last steps.
REFINER = "refiner"
# The parameter of models that are distilled with their guidance: the scale of a negative prompt beside it.
TRUE_GUIDANCE = "true_cfg_scale"

# What a model for text does with the same denoiser: images are the start of its schedule, a mask keeps a part of them.
USUAL_TASKS = (Task.TEXT_TO_IMAGE, Task.IMAGE_TO_IMAGE, Task.INPAINT)

# Chunks of CLIP's 75 tokens that a prompt with weights may have.
CHUNK_TOKENS, MOST_CHUNKS = 75, 8

_CANDIDATES, _NEAREST, _SIMILAR, _COMPARED = 20, 3, 0.4, 100
# Up to this many names are all listed to who gives an unknown one.
_LISTED = 12


@dataclass(frozen=True, slots=True)
class SchedulerSpec:
    """A scheduler: its class, the configuration options it overrides, and the steps it takes.

    The class is one of `own_schedulers` or of diffusers. `schedules` are the spacings of its steps that may be asked
    for, `takes` further options of a request that it has a use for, with their defaults. One that does not `start_pure`
    divides by the least noise what it computes at the most, and so cannot start in pure noise (zero terminal SNR).
    """

    class_name: str
    min_steps: int = 1
    max_steps: int = 1000
    options: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}))
    schedules: tuple[str, ...] = ()
    takes: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    start_pure: bool = True


@dataclass(frozen=True, slots=True)
class CheckpointFiles:
    """The files of a model that is not a diffusers folder.

    `family` is `sdxl`, `sd15`, `flux`, `flux2` or `z-image`; `parts` are pairs of a part (`denoiser`, `vae`, `clip_l`,
    `clip_g`, `t5`, `qwen3`) and its file's path within MODELS_DIR; a part that is not listed is in the denoiser's file.
    `tokenizer` is the place of T5's or Qwen3's tokenizer, a folder or a GGUF file. `prediction` is `epsilon` or
    `v_prediction`; with `zero_snr` the schedule ends in pure noise.
    """

    family: str
    parts: tuple[tuple[str, str], ...]
    tokenizer: str = ""
    prediction: str = ""
    zero_snr: bool = False


@dataclass(frozen=True, slots=True)
class ExtraParameter:
    """A parameter that only some models have: its range (both ends included), its default, and what it does."""

    name: str
    low: float
    high: float
    default: float
    description: str


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
    than usual are left out; usual is layer `usual_clip_skip` from the end, and none can be left out if that is 0.
    `scheduler_options` change the configuration of the model's scheduler, and `quantize` and `offload`
    come before QUANTIZE and OFFLOAD unless they are empty. `checkpoint` lists the files of a model that is
    no diffusers folder; `folder` then is the name of the first of them. `added_parts` are components that other models
    give, as (component, place within MODELS_DIR): an SDXL `refiner`, or Redux as the `image_encoder` of a Flux.

    With `control_shares_layers` the ControlNet computes with layers of the denoiser, which must stay on the device.

    `tasks` are those it draws, and `max_references` is the most images that an edit looks at; larger ones are
    shrunk to `reference_pixels`, so that waiting requests hold no more. Where they are a prompt, they add
    `image_tokens` to it. `extra` are parameters of its own; with `any_extra`, they are those of its diffusers
    class, whose parameter of the name `guidance_name` is the guidance. One that does not `batch` shares no forward
    pass. `source` says where its defaults are from. `owner_keys` are keys of an owner's spec that have an effect on
    it beside those that all models share.

    `prompt_syntax` is how its prompts are written unless a request says otherwise. A model that `weighs_prompts` reads
    weights and up to `MOST_CHUNKS` chunks of 75 tokens; another reads the words of such a prompt. One that
    `takes_prompt_2` has a second text encoder, which may read another prompt; one that `reads_empty_negative` draws
    otherwise with an empty negative prompt than with none.

    An `unread` model is loaded on demand and was not loaded yet: its revision is not final, or it is `remembered` from
    the last load of the same files. `preload` loads it at the start, and a `pinned` one is not unloaded for others.
    `file_bytes` is the size of its files, 0 if unknown.

    `revision` identifies the weights in digests and metadata. `weights` and `control_weights` are the SHA-256 digests
    of the files the revision stands for; for other files `with_weights` adds their digest to the revision.

    `dtype` and `cpu_dtype` name the torch dtype on an accelerator and on the CPU; with `measured_dtype`, the CPU takes
    the faster one of float32 and bfloat16 (see `CpuDtypes`). `variant` names the preferred weight files,
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
    takes_prompt_2: bool = False
    reads_empty_negative: bool = False
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
    control_shares_layers: bool = False
    repo: str | None = None
    control_repo: str | None = None
    lcm_folder: str | None = None
    lcm_repo: str | None = None
    builtin_loras: tuple[tuple[str, float], ...] = ()
    dtype: str = "float32"
    cpu_dtype: str = "float32"
    measured_dtype: bool = False
    variant: str | None = None
    denoiser_part: str = "unet"
    guidance_rescale: float = 0.0
    default_negative_prompt: str = ""
    clip_skip: int = 0
    usual_clip_skip: int = 0
    scheduler_options: tuple[tuple[str, object], ...] = ()
    quantize: str = ""
    offload: str = ""
    unread: bool = False
    remembered: bool = False
    preload: bool = False
    pinned: bool = False
    file_bytes: int = 0
    checkpoint: CheckpointFiles | None = None
    added_parts: tuple[tuple[str, str], ...] = ()
    quantizable_parts: tuple[str, ...] = ("unet", "control")
    tasks: tuple[Task, ...] = USUAL_TASKS
    max_references: int = 0
    reference_pixels: int = 2048 * 2048
    image_tokens: int = 0
    extra: tuple[ExtraParameter, ...] = ()
    guidance_name: str = "guidance_scale"
    any_extra: bool = False
    batches: bool = True
    source: str = ""
    prompt_syntax: PromptSyntax = PromptSyntax.PLAIN
    weighs_prompts: bool = False
    owner_keys: tuple[str, ...] = ()

    def revision_for(self, *, edges: bool) -> str:
        """The revision for an image: that of the weights, plus that of the ControlNet when it follows edges."""
        return f"{self.revision}+edges-{self.control_revision}" if edges and self.control_revision else self.revision


def plain_name(name: str) -> str:
    """A name for comparing: composed Unicode, slashes, no blanks around it, without case."""
    return unicodedata.normalize("NFC", name.strip().replace("\\", "/").strip("/")).casefold()


def nearest_names(name: str, names: Sequence[str]) -> list[str]:
    """Up to three of `names` like this one, the nearest first. Takes time linear in their number."""
    wanted = plain_name(name[:_COMPARED])
    pairs = _pairs(wanted)
    likely = sorted(names, key=lambda known: -len(pairs & _pairs(plain_name(known[:_COMPARED]))))[:_CANDIDATES]
    by_plain = {plain_name(known): known for known in likely}
    return [by_plain[known] for known in difflib.get_close_matches(wanted, by_plain, _NEAREST, _SIMILAR)]


def known_names(wanted: str, names: Sequence[str]) -> str:
    """What to say to who gives an unknown name: all names if they are few, otherwise those most like it."""
    if len(names) <= _LISTED:
        return f"there are {', '.join(names)}"
    near = nearest_names(wanted, names)
    return f"the nearest are {', '.join(near)}" if near else f"there are {len(names)} others, and none is like it"


def _pairs(text: str) -> set[str]:
    """Its pairs of neighbouring characters."""
    return {text[index : index + 2] for index in range(len(text) - 1)}


class ModelTable(Mapping[str, V]):
    """Values by model name. `aliases` are further names of models: they are found, but not iterated over.

    A model of the name itself comes before an alias; aliases are found in any case, as `plain_name` compares them.
    Changes replace the table's contents as a whole, so that other threads can iterate meanwhile.
    """

    def __init__(
        self, values: Mapping[str, V] | Iterable[tuple[str, V]] = (), aliases: Mapping[str, str] | None = None
    ) -> None:
        self._values = dict(values)
        self.aliases = {plain_name(alias): name for alias, name in (aliases or {}).items()}

    def __getitem__(self, name: str) -> V:
        values = self._values
        return values[name] if name in values else values[self.aliases[plain_name(name)]]

    def __contains__(self, name: object) -> bool:
        return name in self._values or self.aliases.get(plain_name(str(name))) in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def keys(self) -> KeysView[str]:
        """The names of the models, without aliases."""
        return self._values.keys()

    def values(self) -> ValuesView[V]:
        """The values of the models, each once."""
        return self._values.values()

    def items(self) -> ItemsView[str, V]:
        """The names and values of the models, without aliases."""
        return self._values.items()

    def put(self, values: Mapping[str, V]) -> None:
        """Add or replace the values of models."""
        self._values = {**self._values, **values}

    def drop(self, names: Collection[str]) -> None:
        """Remove models."""
        self._values = {name: value for name, value in self._values.items() if name not in names}

    def replace_with(self, other: ModelTable[V]) -> None:
        """Take the models and the aliases of another table."""
        self._values, self.aliases = dict(other._values), dict(other.aliases)
