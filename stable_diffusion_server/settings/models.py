"""Which models draw, and on what."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from stable_diffusion_server.settings.kinds import Group

ROOT = Path(__file__).resolve().parent.parent.parent


class Models(Group):
    """Weights and devices."""

    models_dir: Path = Field(ROOT / "models", description="Folder of the model weights.")
    text_to_image_model: Literal["flux", "sdxl"] = Field("sdxl", description="Model used when a request names none.")
    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$",
        description="`auto`, `cpu`, `mps`, `cuda` or `cuda:1`.",
    )
    cpu_threads: int = Field(0, ge=0, le=1024, description="Threads for drawing on the CPU; 0 leaves it to PyTorch.")
