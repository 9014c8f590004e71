"""What is found damaged in DATA_DIR is put aside under another name, with a line in the log, and the rest goes on."""

from __future__ import annotations

import time
from pathlib import Path

import structlog

_log = structlog.get_logger(__name__)

# What SQLite keeps beside a database; left behind, it would be read into the one that takes the place.
_BESIDE = ("-wal", "-shm", "-journal")


def is_blocked(path: Path) -> bool:
    """Whether something that is no file stands where a database, or what SQLite keeps beside it, belongs."""
    parts = [path.with_name(path.name + ending) for ending in ("", *_BESIDE)]
    return any(part.is_dir() or (part.is_symlink() and not part.exists()) for part in parts)


def quarantine(path: Path, reason: str) -> Path:
    """Rename a file or folder to `<name>.broken-<time>`, with what SQLite keeps beside it; the new path.

    Raises `OSError` where the folder cannot be written to. A path that is not there is nothing to do.
    """
    moment = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    number, aside = 0, path.with_name(f"{path.name}.broken-{moment}")
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.name}.broken-{moment}-{number}")
    for ending in ("", *_BESIDE):
        part = path.with_name(path.name + ending)
        if part.exists() or part.is_symlink():
            part.rename(aside.with_name(aside.name + ending))
    _log.error("something in DATA_DIR is damaged and put aside", name=path.name, kept_as=aside.name, reason=reason)
    return aside
