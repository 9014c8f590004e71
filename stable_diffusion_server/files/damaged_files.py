"""Quarantines damaged files of DATA_DIR by renaming them, so that the server can start without them."""

from __future__ import annotations

import time
from pathlib import Path

import structlog

_log = structlog.get_logger(__name__)

# Files that SQLite keeps with a database. If they stayed, SQLite would apply them to the new database.
_SQLITE_SUFFIXES = ("-wal", "-shm", "-journal")


def is_blocked(path: Path) -> bool:
    """Whether a directory or a dangling symlink is where a database, or a file that SQLite keeps with it, should be."""
    paths = [path.with_name(path.name + suffix) for suffix in ("", *_SQLITE_SUFFIXES)]
    return any(path.is_dir() or (path.is_symlink() and not path.exists()) for path in paths)


def quarantine(path: Path, reason: str) -> Path:
    """Rename a file or folder, and the files that SQLite keeps with it, to `<name>.broken-<time>`; return the new path.

    A path that does not exist is ignored. Raises `OSError` if the folder is not writable.
    """
    timestamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    number, renamed = 0, path.with_name(f"{path.name}.broken-{timestamp}")
    while renamed.exists():
        number += 1
        renamed = path.with_name(f"{path.name}.broken-{timestamp}-{number}")
    for suffix in ("", *_SQLITE_SUFFIXES):
        part = path.with_name(path.name + suffix)
        if part.exists() or part.is_symlink():
            part.rename(renamed.with_name(renamed.name + suffix))
    _log.error("damaged file in DATA_DIR renamed", name=path.name, renamed_to=renamed.name, reason=reason)
    return renamed
