"""Files of DATA_DIR: damaged ones are set aside, and the free space of a disk is known."""

from __future__ import annotations

from stable_diffusion_server.files.damaged_files import is_unavailable, set_aside
from stable_diffusion_server.files.disk_space import SPARE_BYTES, Disk

__all__ = [
    "SPARE_BYTES",
    "Disk",
    "is_unavailable",
    "set_aside",
]
