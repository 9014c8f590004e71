"""Writes into the environment what a library reads only there. The one writer, beside the only readers."""

from __future__ import annotations

import os
from pathlib import Path


def quieten_gradio(folder: Path) -> None:
    """Have Gradio keep its files in `folder` and ask nobody else for anything. Call it before Gradio is imported."""
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"


def keep_compiled(folder: Path) -> None:
    """Have PyTorch's compiler keep what it makes in `folder`, for the next start, unless the user said where."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))
