"""Finished pictures as files on disk: written whole, found again after a restart. Knows no bucket and no HTTP."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import structlog

from stable_diffusion_server.errors import NotFound, StorageUnavailable
from stable_diffusion_server.orders import Stored

_log = structlog.get_logger(__name__)

# Below this much free disk nothing more is taken in.
_SPARE_BYTES = 16 * 2**20
# No file takes as long to be written.
_PART_SECONDS = 600.0


@dataclass(frozen=True, slots=True)
class Kept:
    """A finished picture on disk. `overwrite`: it is to replace what is stored under its key."""

    path: Path
    stored: Stored
    overwrite: bool
    bytes_on_disk: int

    @property
    def since(self) -> float:
        """When it was kept, in seconds since 1970, as its name tells; 0 for a name that does not."""
        stamp = self.path.name.partition("-")[0]
        return int(stamp) / 1e9 if stamp.isascii() and stamp.isdigit() else 0.0


class Spool:
    """Files in `folder`, one a picture: a line of facts, then the bytes; whole or not there at all.

    `max_bytes` is where it counts as full. Safe from any thread; two processes may share a folder.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._kept: dict[Path, Kept] = {}
        self._newest: dict[str, Kept] = {}

    def open(self) -> None:
        """Make the folder and find what an earlier run left. Raises `StorageUnavailable` when it cannot be used."""
        with _disk_blamed():
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            for path in self._folder.glob("*.part"):
                _sweep(path)
            found = [self._look(path) for path in sorted(self._folder.glob("*.spool"))]
        for kept in found:
            if kept is not None:
                self.hand_over(kept)

    def waiting(self) -> list[Kept]:
        """What waits, the oldest first."""
        with self._lock:
            return [self._kept[path] for path in sorted(self._kept)]

    def newest(self, key: str) -> Kept | None:
        """The newest of this key that waits."""
        return self._newest.get(key)

    def figures(self) -> tuple[int, int, float]:
        """How many pictures wait, their bytes on disk, and the age of the oldest in seconds."""
        waiting = self.waiting()
        age = max(0.0, time.time() - waiting[0].since) if waiting else 0.0
        return len(waiting), sum(kept.bytes_on_disk for kept in waiting), age

    def admit(self) -> None:
        """Raises `StorageUnavailable` when nothing more can be kept."""
        if self.figures()[1] >= self._max_bytes:
            raise StorageUnavailable("SPOOL_BYTES of pictures wait for it already.", retry_after=30)
        with _disk_blamed():
            if shutil.disk_usage(self._folder).free < _SPARE_BYTES:
                raise OSError(errno.ENOSPC, "nearly full")

    def put(self, data: bytes, stored: Stored, *, overwrite: bool) -> Kept:
        """Keep `data`: when this returns it survives a crash. Raises `StorageUnavailable` for a disk that does not.

        It is the caller's to bring to the store until `hand_over`.
        """
        facts = {
            "key": stored.key,
            "content_type": stored.content_type,
            "record": dict(stored.record),
            "sha256": stored.etag,
            "overwrite": overwrite,
        }
        content = json.dumps(facts).encode() + b"\n" + data
        # Named by time, so that files sort as they came.
        path = self._folder / f"{time.time_ns():020d}-{uuid4().hex[:8]}.spool"
        part = path.with_suffix(".part")
        with _disk_blamed():
            try:
                with part.open("xb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                part.replace(path)
            finally:
                part.unlink(missing_ok=True)
            _sync_folder(self._folder)
        return Kept(path, stored, overwrite, len(content))

    def hand_over(self, kept: Kept) -> None:
        """From here on it waits, to be found and brought."""
        with self._lock:
            self._kept[kept.path] = kept
            self._newest[kept.stored.key] = kept

    def read(self, kept: Kept) -> bytes:
        """The picture. Raises `NotFound` when it is gone meanwhile."""
        try:
            return kept.path.read_bytes().partition(b"\n")[2]
        except FileNotFoundError as error:
            raise NotFound("There is no picture under this name.") from error

    def drop(self, kept: Kept) -> None:
        """Forget it and remove the file."""
        self._forget(kept)
        kept.path.unlink(missing_ok=True)

    def set_aside(self, kept: Kept) -> None:
        """Forget it, but leave the file, under another ending, for a person to look at."""
        self._forget(kept)
        with suppress(FileNotFoundError):
            kept.path.replace(kept.path.with_suffix(".refused"))

    def _forget(self, kept: Kept) -> None:
        with self._lock:
            self._kept.pop(kept.path, None)
            if self._newest.get(kept.stored.key) == kept:
                del self._newest[kept.stored.key]

    def _look(self, path: Path) -> Kept | None:
        """What a file left by an earlier run holds; one that is not whole is set aside."""
        content = path.read_bytes()
        head, _, data = content.partition(b"\n")
        try:
            facts = json.loads(head)
            if hashlib.sha256(data).hexdigest() != facts["sha256"]:
                raise ValueError("its bytes are not those it was given")  # noqa: TRY301  # told below, like the others
            stored = Stored(facts["key"], len(data), facts["sha256"], facts["content_type"], facts["record"], True)
            return Kept(path, stored, bool(facts["overwrite"]), len(content))
        except (ValueError, KeyError, TypeError) as error:
            _log.error("a spooled picture cannot be read and is set aside", file=path.name, reason=str(error))
            path.replace(path.with_suffix(".refused"))
            return None


def _sweep(path: Path) -> None:
    """Remove a file that was begun long ago; a young one may be another process's, being written this moment."""
    with suppress(FileNotFoundError):
        if time.time() - path.stat().st_mtime > _PART_SECONDS:
            path.unlink()


@contextmanager
def _disk_blamed() -> Iterator[None]:
    """Turn the operating system's errors into `StorageUnavailable`, which names no path."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else type(error).__name__
        raise StorageUnavailable(f"DATA_DIR cannot keep pictures ({reason}).") from error


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` last, where the system lets folders be opened."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
