"""The rows that models of the operator's follow, by what their files say: pipeline class, sizes, defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from stable_diffusion_server.pipelines.catalog import REAL_MODELS
from stable_diffusion_server.pipelines.library import FileIdentity
from stable_diffusion_server.pipelines.library.identity import ModelTask
from stable_diffusion_server.pipelines.model_spec import ModelSpec

# The repositories and LoRAs of the catalogue's models belong to those alone.
_SDXL = replace(REAL_MODELS["sdxl"][-1], repo=None, control_repo=None, lcm_folder=None, lcm_repo=None)
_SCHNELL = replace(REAL_MODELS["flux"][0], repo=None, control_repo=None)
_DEV = replace(_SCHNELL, default_steps=28, default_guidance=3.5, text_tokens=512, takes_guidance=True)

# (family, variant, task) as a `FileIdentity` has them → the row. A variant that has no row of its own takes that of "".
_ROWS: Mapping[tuple[str, str, ModelTask], ModelSpec] = {
    ("sdxl", "", ModelTask.NORMAL): _SDXL,
    ("sdxl", "", ModelTask.INPAINT): replace(
        _SDXL, pipeline_class="StableDiffusionXLInpaintPipeline", control_folder=None
    ),
    ("flux", "schnell", ModelTask.NORMAL): _SCHNELL,
    ("flux", "dev", ModelTask.NORMAL): _DEV,
}


def family_row(identity: FileIdentity) -> ModelSpec | None:
    """The row of a model file or folder; `None` if nothing here draws it."""
    return _ROWS.get((identity.family, identity.variant, identity.task))


def drawn_families() -> str:
    """The families that are drawn, for a sentence."""
    return ", ".join(dict.fromkeys(family for family, _, _ in _ROWS))
