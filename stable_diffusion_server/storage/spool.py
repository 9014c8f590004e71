"""Finished pictures as files on disk: written whole, found again after a restart. Knows no bucket and no HTTP."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from uuid import uuid4

import structlog

from stable_diffusion_server.errors import NotFound, StorageRefused, StorageUnavailable
from stable_diffusion_server.files import MIN_FREE_BYTES, Disk
from stable_diffusion_server.storage.dead_letters import RETRIED, DeadLetters, verify_spool_file
from stable_diffusion_server.types import StoredObject

_log = structlog.get_logger(__name__)

# No file takes as long to be written.
_PART_SECONDS = 600.0


@dataclass(frozen=True, slots=True)
class SpooledObject:
    """A finished picture on disk. `overwrite`: it is to replace what is stored under its key."""

    path: Path
    stored: StoredObject
    overwrite: bool
    bytes_on_disk: int

    @property
    def queued_at(self) -> float:
        """When it was kept, in seconds since 1970, as its name tells; 0 for a name that does not."""
        stamp = self.path.name.partition("-")[0]
        return int(stamp) / 1e9 if stamp.isascii() and stamp.isdigit() else 0.0


class UploadSpool:
    """Files in `folder`, one a picture: a line of facts, then the bytes; whole or not there at all.

    `max_bytes` is where it counts as full. What cannot be read, or is refused by the store, goes to the dead letters in
    the folder beside. Safe from any thread; two processes may share a folder.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._disk = Disk(folder)
        self._lock = threading.Lock()
        self._queued: dict[Path, SpooledObject] = {}
        self._latest: dict[str, SpooledObject] = {}
        # Those that a caller was given a URL of before the store refused them, by key: they are given still.
        self._rejected: dict[str, SpooledObject] = {}
        self.dead_letters = DeadLetters(folder.with_name("dead-letters"), max(max_bytes // 4, MIN_FREE_BYTES))

    def open(self) -> None:
        """Make the folder and find what an earlier run left. Raises `StorageUnavailable` when it cannot be used."""
        with self._translated_errors():
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            for path in self._folder.glob("*.part"):
                _remove_stale_part(path)
            left = sorted(self._folder.glob("*.spool"))
        for path in left:
            if (kept := self._load_or_reject(path)) is not None:
                self.enqueue(kept)
        for letter in self.dead_letters.list_all():
            if letter.key and not letter.caller_informed:
                with suppress(OSError, ValueError):
                    self._rejected[letter.key] = _load_file(letter.path)

    def waiting(self) -> list[SpooledObject]:
        """What waits, the oldest first."""
        with self._lock:
            return [self._queued[path] for path in sorted(self._queued)]

    def latest(self, key: str) -> SpooledObject | None:
        """The newest of this key that waits."""
        return self._latest.get(key)

    def rejected(self, key: str) -> SpooledObject | None:
        """What was accepted under this key and refused by the store afterwards."""
        return self._rejected.get(key)

    def stats(self) -> tuple[int, int, float]:
        """How many pictures wait, their bytes on disk, and the age of the oldest in seconds."""
        waiting = self.waiting()
        age = max(0.0, time.time() - waiting[0].queued_at) if waiting else 0.0
        return len(waiting), sum(kept.bytes_on_disk for kept in waiting), age

    def check_capacity(self) -> None:
        """Raises `StorageUnavailable` when nothing more can be kept."""
        if self.stats()[1] >= self._max_bytes:
            raise StorageUnavailable("SPOOL_BYTES of pictures wait for it already.", retry_after=30)
        with self._translated_errors():
            self._disk.check()

    def put(self, data: bytes, stored: StoredObject, *, overwrite: bool) -> SpooledObject:
        """Keep `data`: when this returns it survives a crash. Raises `StorageUnavailable` for a disk that does not.

        It is the caller's to bring to the store until `enqueue`.
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
        with self._translated_errors():
            try:
                with part.open("xb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                part.replace(path)
            finally:
                part.unlink(missing_ok=True)
            _sync_folder(self._folder)
        return SpooledObject(path, stored, overwrite, len(content))

    def enqueue(self, kept: SpooledObject) -> None:
        """From here on it waits, to be found and brought."""
        with self._lock:
            self._queued[kept.path] = kept
            self._latest[kept.stored.key] = kept

    def read(self, kept: SpooledObject) -> bytes:
        """The picture. Raises `NotFound` when it is gone meanwhile."""
        try:
            return kept.path.read_bytes().partition(b"\n")[2]
        except FileNotFoundError as error:
            raise NotFound("There is no picture under this name.") from error
        except OSError as error:
            raise StorageRefused(f"The waiting picture cannot be read ({error.strerror}).") from error

    def drop(self, kept: SpooledObject) -> None:
        """Forget it and remove the file."""
        self._forget(kept)
        with suppress(OSError):  # gone already; or the disk gives it back at the next start
            kept.path.unlink()

    def reject(self, kept: SpooledObject, reason: str, *, caller_informed: bool = False) -> None:
        """Forget it and put the file among the dead letters.

        `caller_informed`: its caller knows that the store refused it.
        """
        _log.error("the storage refuses a picture, which is set aside", name=kept.stored.key, reason=reason)
        self._forget(kept)
        path = self.dead_letters.add(kept.path, reason, caller_informed=caller_informed)
        if path is not None and not caller_informed:
            self._rejected[kept.stored.key] = replace(kept, path=path)

    def discard_rejected(self, key: str) -> None:
        """Remove what was set aside under this key: it is deleted, or another picture is stored there."""
        kept = self._rejected.pop(key, None)
        for letter in self.dead_letters.list_all() if kept is not None else ():
            if letter.key == key:
                with suppress(OSError):
                    self.dead_letters.drop(letter)

    def enqueue_retried(self) -> None:
        """Have those wait again that a person put back; see `DeadLetters.retry`."""
        with suppress(OSError):
            for path in sorted(self._folder.glob(f"*{RETRIED}")):
                again = path.with_suffix(".spool")
                with suppress(OSError):  # another process was faster, or something stands in its way
                    path.replace(again)
                    if (kept := self._load_or_reject(again)) is not None:
                        self._rejected.pop(kept.stored.key, None)
                        self.enqueue(kept)

    @contextmanager
    def _translated_errors(self) -> Iterator[None]:
        """Turn the operating system's errors into `StorageUnavailable`, which names no path."""
        try:
            yield
        except OSError as error:
            self._disk.record_failure(error)
            reason = os.strerror(error.errno) if error.errno else type(error).__name__
            raise StorageUnavailable(f"DATA_DIR cannot keep pictures ({reason}).", retry_after=30) from error

    def _forget(self, kept: SpooledObject) -> None:
        with self._lock:
            self._queued.pop(kept.path, None)
            if self._latest.get(kept.stored.key) == kept:
                del self._latest[kept.stored.key]

    def _load_or_reject(self, path: Path) -> SpooledObject | None:
        """What a file left by an earlier run holds; whatever else bears such a name is set aside."""
        try:
            return _load_file(path)
        except (OSError, ValueError, RecursionError) as error:
            reason = os.strerror(error.errno or 0) if isinstance(error, OSError) else str(error)
            _log.error("a spooled picture cannot be read and is set aside", file=path.name, reason=reason)
            self.dead_letters.add(path, f"It could not be read: {reason}.", caller_informed=True)
            return None


def _load_file(path: Path) -> SpooledObject:
    """A whole file of this folder. Raises `OSError` and `ValueError`."""
    facts, size = verify_spool_file(path)
    stored = StoredObject(facts["key"], size, facts["sha256"], facts["content_type"], facts["record"], waiting=True)
    return SpooledObject(path, stored, facts["overwrite"], path.stat().st_size)


def _remove_stale_part(path: Path) -> None:
    """Remove a file that was begun long ago; a young one may be another process's, being written this moment."""
    with suppress(OSError):  # gone, or a folder of that name
        if time.time() - path.lstat().st_mtime > _PART_SECONDS:
            path.unlink()


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` last, where the system lets folders be opened."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
