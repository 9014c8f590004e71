"""Names of the files in a folder that requests name files in: LoRAs and embeddings."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

from stable_diffusion_server.files import walk_files
from stable_diffusion_server.types import LORA_NAME_PATTERN

_NAME = re.compile(LORA_NAME_PATTERN)
# A file changed more recently than this may change again without a new timestamp.
UNSETTLED_SECONDS = 2.0


class NamedFiles:
    """The files of some endings in a folder and its subfolders, by name; none without a folder.

    Of two files of one name the one nearer to the top has it, and the other its path in the folder.
    """

    def __init__(self, folder: Path | None, *suffixes: str) -> None:
        self._folder = folder
        self._suffixes = suffixes

    def read(self) -> dict[str, Path]:
        """Path of every file by name."""
        files: dict[str, Path] = {}
        for file in self._walk():
            name = file.stem if file.stem not in files else self.place(file)
            if is_name(name):
                files.setdefault(name, file)
        return files

    def unnamed(self) -> Iterator[str]:
        """Names of the files that requests cannot name, in ASCII: they may not be valid text."""
        return (ascii(file.name) for file in self._walk() if not is_name(file.stem))

    def place(self, file: Path) -> str:
        """The path of a file in the folder, without its ending."""
        return file.with_suffix("").relative_to(self._folder or file).as_posix()

    def _walk(self) -> Iterator[Path]:
        return walk_files(self._folder, *self._suffixes) if self._folder is not None else iter(())


def is_name(name: str) -> bool:
    """Whether requests can name a file so."""
    return name.isprintable() and _NAME.fullmatch(name) is not None


def why_unnamed(name: str) -> str:
    """The sentence about a file that requests cannot name."""
    return f'{name} cannot be asked for: names have up to 100 printable characters, without , : < > " and \\.'


def is_settled(facts: os.stat_result) -> bool:
    """Whether the file is old enough that a further change would change its timestamps."""
    return time.time() - max(facts.st_mtime, facts.st_ctime) > UNSETTLED_SECONDS
