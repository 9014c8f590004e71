"""Which models draw, in what placement, and on what."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from stable_diffusion_server.settings.base import Names, SettingsGroup

ROOT = Path(__file__).resolve().parent.parent.parent
# In the source tree its own folder; an installed package has none, and its user's is where the server is started.
_IN_TREE = (ROOT / "models" / "README.md").is_file()

# One of the names in PERFORMANCE, as pipelines/performance.py has them.
_PART = "(off|safe|fast|layout|onednn|tf32|vae-bf16|compile|compile-whole|graphs|trace)"


class ModelSettings(SettingsGroup):
    """Weights, adapters and devices."""

    models: Literal["embedded", "local", "hub", "auto"] = Field(
        "auto",
        description=(
            "Which weights draw: `embedded`, those that come with the server; `local`, the real ones in MODELS_DIR; "
            "`hub`, these, and those of HUB_MODELS from the Hugging Face hub; `auto`, the real ones that are in "
            "MODELS_DIR and that the device can hold, else the embedded ones."
        ),
    )
    hub_models: Names = Field(
        (),
        description=(
            "What MODELS=hub fetches where its folder is missing, by family (`sdxl`, `flux`), folder or repository, "
            "with commas between. Empty: the family of TEXT_TO_IMAGE_MODEL. Repositories whose licence is to be "
            "accepted need HF_TOKEN; HF_HOME is where the files go."
        ),
    )
    hub_revisions: Names = Field(
        (),
        description=(
            "Branch, tag or commit of repositories on the hub, as in `stabilityai/stable-diffusion-xl-base-1.0@main`, "
            "with commas between. Of others the commit that was fetched first is kept, in DATA_DIR."
        ),
    )
    models_dir: Path = Field(
        ROOT / "models" if _IN_TREE else Path("models"),
        description="Folder of the model weights. The embedded ones come along with an installed package.",
    )
    text_to_image_model: Literal["flux", "sdxl"] = Field("sdxl", description="Model used when a request names none.")
    lora_dir: Path | None = Field(
        None,
        description=(
            "Folder of the LoRA adapters (`.safetensors`) that requests may name, with its sub-folders. Links are "
            "followed, out of it too. Empty: none."
        ),
    )
    max_lora_bytes: int = Field(
        4 * 2**30,
        ge=1,
        description="Bytes of the largest adapter file that is read; it is held in memory while it is loaded.",
    )
    load_lcm_lora: bool = Field(
        False,
        description="1 draws SDXL by its LCM LoRA (`lcm-lora-sdxl` in MODELS_DIR): 5 steps, hardly any guidance.",
    )
    controlnet_lora: str = Field(
        "",
        description="LoRA put on Flux's ControlNet for good: a `.safetensors` file, or a folder or repository of one.",
    )
    df11_model_path: str = Field(
        "",
        description="DFloat11 weights (lossless, CUDA only) for Flux's transformer: a folder or repository.",
    )
    offload: Literal["auto", "none", "model", "group", "sequential"] = Field(
        "auto",
        description=(
            "Where weights are while nothing is drawn: `none` keeps them on the device; `model`, `group` and "
            "`sequential` move parts, groups of layers or single layers there. `auto` decides by free memory."
        ),
    )
    quantize: Literal["auto", "none", "int8", "float8", "torchao-int8", "torchao-float8", "torchao-float8-dynamic"] = (
        Field(
            "auto",
            description=(
                "Weights in one byte each, by optimum-quanto or torchao (to be installed). `auto`: int8 where the "
                "device cannot hold them otherwise. `torchao-float8-dynamic` computes in float8 too, faster and "
                "coarser, on NVIDIA from compute capability 8.9 on."
            ),
        )
    )
    performance: str = Field(
        "safe",
        pattern=rf"^{_PART}(,{_PART})*$",
        description=(
            "`off`; `safe`: memory layouts, oneDNN and TF32, which change rounding alone, and on the CPU passes "
            "without Python, which change nothing; `fast`: on an accelerator also a VAE in bf16, compiled blocks and "
            "CUDA graphs, for which the first picture of each size waits, but for those of WARMUP_SIZES. Or parts with "
            "commas between: `layout`, `onednn`, `tf32`, `trace`, `vae-bf16`, `compile`, `compile-whole`, `graphs`."
        ),
    )
    warmup_sizes: Names = Field(
        (),
        description=(
            "Sizes, as in `1024x1024,512x768`, that every model draws once before the server is ready: they are "
            "compiled then, where PERFORMANCE=fast."
        ),
    )
    mmap_weights: bool = Field(
        False,
        description=(
            "1 leaves weights on the CPU mapped from their files, which saves memory where several processes draw: "
            "replace such files by renaming others over them, since writing into one ends the process. 0 copies them."
        ),
    )
    attention_slicing: bool = Field(False, description="1 computes attention in slices: less memory, slower.")
    vae_slicing: bool = Field(False, description="1 decodes the pictures of a batch one by one: less memory.")
    vae_tiling: bool = Field(False, description="1 decodes large pictures in tiles: less memory, faint differences.")
    prompt_cache_bytes: int = Field(
        67_108_864, ge=0, description="Encoded prompts each model keeps for when they come again, in bytes; 0: none."
    )
    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$",
        description="`auto`, `cpu`, `mps`, `cuda` or `cuda:1`.",
    )
    cpu_threads: int = Field(0, ge=0, le=1024, description="Threads for drawing on the CPU; 0 leaves it to PyTorch.")

    @field_validator("warmup_sizes")
    @classmethod
    def _widths_by_heights(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for size in value:
            if not re.fullmatch(r"[1-9]\d{1,4}x[1-9]\d{1,4}", size):
                raise ValueError(f"{size!r} is not a width and a height in pixels, such as 1024x768")
        return value

    def warmup_sizes_in_pixels(self) -> list[tuple[int, int]]:
        """Width and height of each of WARMUP_SIZES, in pixels."""
        return [(int(width), int(height)) for width, _, height in (size.partition("x") for size in self.warmup_sizes)]

    @field_validator("hub_revisions")
    @classmethod
    def _repositories_at_revisions(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for entry in value:
            if not re.fullmatch(r"[\w.-]{1,96}/[\w.-]{1,96}@[\w./-]{1,200}", entry):
                raise ValueError(f"{entry!r} is not a repository and a revision, such as owner/name@main")
        return value

    @model_validator(mode="after")
    def _placements_that_go_together(self) -> Self:
        if self.offload == "sequential" and self.quantize not in ("auto", "none"):
            raise ValueError(
                f"OFFLOAD=sequential cannot be combined with QUANTIZE={self.quantize}: take OFFLOAD=group or model"
            )
        return self

    def revisions(self) -> dict[str, str]:
        """The revision of each repository of HUB_REVISIONS."""
        return {repo: revision for repo, _, revision in (entry.partition("@") for entry in self.hub_revisions)}

    @field_validator("lora_dir", mode="before")
    @classmethod
    def _no_folder_if_empty(cls, value: Any) -> Any:
        return value or None
