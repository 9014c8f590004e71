"""Settings of the models: weights, adapters, placement, acceleration, device."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from stable_diffusion_server.settings.base import Folders, Names, SettingsGroup, none_if_empty

ROOT = Path(__file__).resolve().parent.parent.parent
# An installed package has no `models` folder beside it: there the folder is relative to the working directory.
_IN_TREE = (ROOT / "models" / "README.md").is_file()

# Names of the optimizations in pipelines/acceleration/apply.py, which imports torch and so cannot be imported here.
_OPTIMIZATION = "(off|safe|fast|layout|onednn|tf32|vae-bf16|compile|compile-whole|graphs|trace)"


class ModelSettings(SettingsGroup):
    """Which models are loaded, from where, and how they run."""

    models: Literal["embedded", "local", "hub", "auto"] = Field(
        "auto",
        description=(
            "Which weights are used: `embedded`, the small ones that come with the server; `local`, the files and "
            "folders in MODELS_DIR; `hub`, those and HUB_MODELS from the Hugging Face hub; `auto`, those in "
            "MODELS_DIR beside the embedded ones (then `embedded-sdxl`, `embedded-flux`), or these alone if "
            "MODELS_DIR holds none."
        ),
    )
    hub_models: Names = Field(
        (),
        description=(
            "Models that MODELS=hub downloads if their folder is missing, separated by commas: model name (`sdxl`, "
            "`flux`), folder or repository. Empty: TEXT_TO_IMAGE_MODEL. Gated repositories need HF_TOKEN; HF_HOME "
            "is where the files go."
        ),
    )
    hub_revisions: Names = Field(
        (),
        description=(
            "Branch, tag or commit of hub repositories, such as `stabilityai/stable-diffusion-xl-base-1.0@main`, "
            "separated by commas. For others the first downloaded commit stays pinned, in DATA_DIR."
        ),
    )
    models_dir: Folders = Field(
        (ROOT / "models" if _IN_TREE else Path("models"),),
        description=(
            "Folder of the model weights, or several, separated by commas or as in PATH. Files are loaded from all, "
            "diffusers folders from the first one that holds a model of the catalogue, else the first. The embedded "
            "models are part of the installed package."
        ),
    )
    text_to_image_model: str = Field(
        "sdxl",
        description=(
            "Model of a request that names none: `sdxl`, `flux`, or any model in MODELS_DIR, which then is also meant "
            "by the name of its family."
        ),
    )
    model_memory: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        "auto",
        description=(
            "Bytes that the weights of all models together may take; the least recently used models are unloaded for "
            "others. `auto`: 90 % of the memory of the device that is free at the start, less what the largest "
            "picture needs."
        ),
    )
    model_shares: Names = Field(
        (),
        description=(
            "Models in the order in which they are placed at the start, with the share of the device's free memory "
            "that each may take for its weights and for drawing: `flux=0.7,sdxl=0.3`. A name without a share takes "
            "what is free. Empty: TEXT_TO_IMAGE_MODEL first."
        ),
    )
    model_switch_patience: float = Field(
        30.0,
        ge=0,
        allow_inf_nan=False,
        description=(
            "Seconds that a request waits for a model that is not loaded while requests of loaded models go first; "
            "then its model is loaded as soon as the requests are done that another model was loaded for."
        ),
    )
    styles_file: Annotated[Path | None, BeforeValidator(none_if_empty)] = Field(
        None,
        description=(
            "CSV file of the styles that requests may name, in the form of AUTOMATIC1111's `styles.csv`. Each request "
            "sees its current content. Empty: no styles."
        ),
    )
    wildcards_dir: Annotated[Path | None, BeforeValidator(none_if_empty)] = Field(
        None,
        description=(
            "Folder, with sub-folders, of the lists (`.txt`, one option a line) that `__name__` in a prompt names. "
            "Links are followed, also out of the folder. Empty: no lists."
        ),
    )
    expand_wildcards: bool = Field(
        False,
        description=(
            "1 picks options in braces and lists such as `__colour__` in the prompts of requests that do not say "
            "`wildcards`; 0 leaves them as text."
        ),
    )
    lora_dir: Annotated[Path | None, BeforeValidator(none_if_empty)] = Field(
        None,
        description=(
            "Folder, with sub-folders, of the LoRA adapters (`.safetensors`) that requests may name. Links are "
            "followed, also out of the folder. Empty: no adapters."
        ),
    )
    embeddings_dir: Annotated[Path | None, BeforeValidator(none_if_empty)] = Field(
        None,
        description=(
            "Folder, with sub-folders, of the textual inversion embeddings (`.safetensors`) that prompts for "
            "SD 1.5 and SDXL may name. Links are followed, also out of the folder. Empty: no embeddings."
        ),
    )
    max_lora_bytes: int = Field(
        4 * 2**30,
        ge=1,
        description="Maximum size of an adapter file in bytes; it is held in memory while it is loaded.",
    )
    load_lcm_lora: bool = Field(
        False,
        description="1 loads the LCM LoRA (`lcm-lora-sdxl` in MODELS_DIR) into SDXL: 5 steps, almost no guidance.",
    )
    controlnet_lora: str = Field(
        "",
        description=(
            "LoRA fused into Flux's ControlNet at the start: a `.safetensors` file, or a folder or repository with one."
        ),
    )
    df11_model_path: str = Field(
        "",
        description="DFloat11 weights (lossless, CUDA only) of Flux's transformer: a folder or repository.",
    )
    offload: Literal["auto", "none", "model", "group", "sequential"] = Field(
        "auto",
        description=(
            "Where idle weights are: `none` keeps them on the device; `model`, `group` and `sequential` move whole "
            "components, groups of layers or single layers to it when needed. `auto` decides by free memory."
        ),
    )
    quantize: Literal["auto", "none", "int8", "float8", "torchao-int8", "torchao-float8", "torchao-float8-dynamic"] = (
        Field(
            "auto",
            description=(
                "Weights in 8 bits, by optimum-quanto or torchao (to be installed); on a CPU `int8` needs no package. "
                "`auto`: int8 if the device cannot hold them otherwise. `torchao-float8-dynamic` also computes in "
                "float8, faster and less exact, on NVIDIA with compute capability 8.9 or higher."
            ),
        )
    )
    performance: str = Field(
        "safe",
        pattern=rf"^{_OPTIMIZATION}(,{_OPTIMIZATION})*$",
        description=(
            "`off`; `safe`: memory layouts, oneDNN and TF32, which change rounding only, and TorchScript on the CPU, "
            "which changes nothing; `fast`: on an accelerator also a VAE in bf16, compiled blocks and CUDA graphs, "
            "which delay the first image of each size, except WARMUP_SIZES. Or single optimizations, separated by "
            "commas: `layout`, `onednn`, `tf32`, `trace`, `vae-bf16`, `compile`, `compile-whole`, `graphs`."
        ),
    )
    warmup_sizes: Names = Field(
        (),
        description=(
            "Sizes, such as `1024x1024,512x768`, that every model generates once before the server is ready, which "
            "compiles them with PERFORMANCE=fast."
        ),
    )
    mmap_weights: bool = Field(
        False,
        description=(
            "1 keeps weights on the CPU memory-mapped, single files in 16 bits also where float32 is computed: half "
            "the memory, somewhat slower, the same images. Several processes share them. Replace "
            "such files only by renaming others over them: writing into one ends the process. 0 copies them."
        ),
    )
    attention_slicing: bool = Field(False, description="1 computes attention in slices: less memory, slower.")
    vae_slicing: bool = Field(False, description="1 decodes the images of a batch one by one: less memory.")
    vae_tiling: bool = Field(False, description="1 decodes large images in tiles: less memory, faint differences.")
    prompt_cache_bytes: int = Field(
        67_108_864, ge=0, description="Maximum bytes of cached prompt embeddings per model; 0: no cache."
    )
    vision_memory: int = Field(
        8 * 2**30,
        ge=2**30,
        description=(
            "Maximum bytes of the process that runs models of preprocessors, detectors and classifiers on the CPU, "
            "beyond what it takes while idle."
        ),
    )
    vision_timeout: float = Field(
        120.0,
        gt=0,
        le=3600,
        allow_inf_nan=False,
        description="Maximum seconds that such a model takes for an image, loading included; then its process ends.",
    )
    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$",
        description="`auto`, `cpu`, `mps`, `cuda` or `cuda:1`.",
    )
    cpu_threads: int = Field(
        0,
        ge=0,
        le=1024,
        description="Threads that compute on the CPU, of all workers together; 0: PyTorch's default, the cores.",
    )
    cpu_dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description=(
            "Numbers in which real models compute on a CPU, unless their spec says it. `auto`: float32, or bfloat16 "
            "where that was measured to be 1.3 times as fast, or float32 does not fit into the memory; the measurement "
            "is kept in DATA_DIR."
        ),
    )

    @field_validator("warmup_sizes")
    @classmethod
    def _are_sizes(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for size in value:
            if not re.fullmatch(r"[1-9]\d{1,4}x[1-9]\d{1,4}", size):
                raise ValueError(f"{size!r} is not a width and a height in pixels, such as 1024x768")
        return value

    @field_validator("model_shares")
    @classmethod
    def _are_shares(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        names = [entry.partition("=")[0].strip() for entry in value]
        shares = [_share_of(entry) for entry in value]
        if "" in names or len({*names}) < len(names):
            raise ValueError("each entry names another model, such as flux=0.7")
        if sum(share for share in shares if share is not None) > 1 + 1e-9:
            raise ValueError("the shares together are more than 1")
        return value

    @field_validator("hub_revisions")
    @classmethod
    def _are_revisions(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for entry in value:
            if not re.fullmatch(r"[\w.-]{1,96}/[\w.-]{1,96}@[\w./-]{1,200}", entry):
                raise ValueError(f"{entry!r} is not a repository and a revision, such as owner/name@main")
        return value

    @model_validator(mode="after")
    def _can_be_combined(self) -> Self:
        if self.offload == "sequential" and self.quantize not in ("auto", "none"):
            raise ValueError(
                f"OFFLOAD=sequential cannot be combined with QUANTIZE={self.quantize}: take OFFLOAD=group or model"
            )
        return self

    def warmup_sizes_in_pixels(self) -> list[tuple[int, int]]:
        """Return WARMUP_SIZES as (width, height) pairs, in pixels."""
        return [(int(width), int(height)) for width, _, height in (size.partition("x") for size in self.warmup_sizes)]

    def shares(self) -> dict[str, float | None]:
        """Return the models of MODEL_SHARES in their order, with their shares; `None` without one."""
        return {entry.partition("=")[0].strip(): _share_of(entry) for entry in self.model_shares}

    def revisions(self) -> dict[str, str]:
        """Return the revision of each repository named in HUB_REVISIONS."""
        return {repo: revision for repo, _, revision in (entry.partition("@") for entry in self.hub_revisions)}


def _share_of(entry: str) -> float | None:
    """Return the share in an entry of MODEL_SHARES, above 0 and at most 1; `None` without one."""
    _, separator, text = entry.partition("=")
    if not separator:
        return None
    if not re.fullmatch(r"\s*(0?\.\d{1,6}|1(\.0{1,6})?)\s*", text) or float(text) == 0:
        raise ValueError(f"{entry!r} does not end in a share above 0 and at most 1, such as flux=0.7")
    return float(text)
