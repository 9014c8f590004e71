"""Files in DATA_DIR: quarantine of damaged files, and disk space and disk errors."""

from __future__ import annotations

from stable_diffusion_server.files.damaged_files import is_blocked, quarantine
from stable_diffusion_server.files.disk_space import MIN_FREE_BYTES, Disk

__all__ = [
    "MIN_FREE_BYTES",
    "Disk",
    "is_blocked",
    "quarantine",
]
