"""Files on disk: quarantine of damaged files, disk space and disk errors, walking the operator's folders."""

from __future__ import annotations

from stable_diffusion_server.files.damaged_files import is_blocked, quarantine
from stable_diffusion_server.files.disk_space import MIN_FREE_BYTES, Disk
from stable_diffusion_server.files.folder_walk import walk_files
from stable_diffusion_server.files.text_files import TextFiles, UnreadableText

__all__ = [
    "MIN_FREE_BYTES",
    "Disk",
    "TextFiles",
    "UnreadableText",
    "is_blocked",
    "quarantine",
    "walk_files",
]
