"""Where a folder of weights is: among the user's own, or with the package. Knows no models and loads nothing."""

from __future__ import annotations

from pathlib import Path

# A wheel carries the embedded models here; in the source tree they are in models/ (see pyproject.toml).
PACKAGED = Path(__file__).resolve().parent.parent / "embedded"


def folder_in(models_dir: Path, name: str) -> Path:
    """The folder of that name in `models_dir`, which comes first, or what the package brought under that name."""
    own, packaged = models_dir / name, PACKAGED / name
    return packaged if packaged.is_dir() and not own.is_dir() else own
