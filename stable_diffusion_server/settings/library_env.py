"""Sets environment variables that libraries read. Only this package reads or writes the environment."""

from __future__ import annotations

import os
from pathlib import Path


def configure_gradio(folder: Path) -> None:
    """Make Gradio keep its files in `folder` and send no analytics. Call before Gradio is imported."""
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"


def set_compiler_cache(folder: Path) -> None:
    """Make PyTorch's compiler cache its output in `folder` for the next start, unless the user chose a folder."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))
