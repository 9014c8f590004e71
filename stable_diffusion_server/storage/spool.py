"""Disk queue of images that wait for upload; it survives restarts."""

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

# Partial files older than this are left over from a crash.
_PART_SECONDS = 600.0


@dataclass(frozen=True, slots=True)
class SpooledObject:
    """A spooled image on disk. `overwrite`: the upload replaces an object stored under the key."""

    path: Path
    stored: StoredObject
    overwrite: bool
    bytes_on_disk: int

    @property
    def queued_at(self) -> float:
        """Seconds since 1970, from the file name; 0 for other names."""
        stamp = self.path.name.partition("-")[0]
        return int(stamp) / 1e9 if stamp.isascii() and stamp.isdigit() else 0.0


class UploadSpool:
    """Holds one file per image in `folder`: a JSON header line, then the bytes. Files appear atomically.

    The spool is full at `max_bytes`. Unreadable and rejected files move to the sibling folder `dead-letters`.
    Thread-safe; two processes may share a folder.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._disk = Disk(folder)
        self._lock = threading.Lock()
        self._queued: dict[Path, SpooledObject] = {}
        self._latest: dict[str, SpooledObject] = {}
        # Objects that the store rejected after a caller got their URL, by key; this server still serves them.
        self._rejected: dict[str, SpooledObject] = {}
        self.dead_letters = DeadLetters(folder.with_name("dead-letters"), max(max_bytes // 4, MIN_FREE_BYTES))

    def open(self) -> None:
        """Create the folder and load the files of earlier runs. Raises `StorageUnavailable` if it is unusable."""
        with self._translated_errors():
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            for path in self._folder.glob("*.part"):
                _remove_stale_part(path)
            left = sorted(self._folder.glob("*.spool"))
        for path in left:
            if (spooled := self._load_or_reject(path)) is not None:
                self.enqueue(spooled)
        for letter in self.dead_letters.list_all():
            if letter.key and not letter.caller_informed:
                with suppress(OSError, ValueError):
                    self._rejected[letter.key] = _load_file(letter.path)

    def waiting(self) -> list[SpooledObject]:
        """Return the queued objects, oldest first."""
        with self._lock:
            return [self._queued[path] for path in sorted(self._queued)]

    def latest(self, key: str) -> SpooledObject | None:
        """Return the newest queued object of a key, or `None`."""
        return self._latest.get(key)

    def rejected(self, key: str) -> SpooledObject | None:
        """Return the object of a key that the store rejected after the server accepted it, or `None`."""
        return self._rejected.get(key)

    def stats(self) -> tuple[int, int, float]:
        """Return the number of queued images, their bytes on disk, and the age of the oldest in seconds."""
        waiting = self.waiting()
        age = max(0.0, time.time() - waiting[0].queued_at) if waiting else 0.0
        return len(waiting), sum(spooled.bytes_on_disk for spooled in waiting), age

    def check_capacity(self) -> None:
        """Raise `StorageUnavailable` when the spool or the disk is full."""
        if self.stats()[1] >= self._max_bytes:
            raise StorageUnavailable("SPOOL_BYTES of pictures wait for it already.", retry_after=30)
        with self._translated_errors():
            self._disk.check()

    def put(self, data: bytes, stored: StoredObject, *, overwrite: bool) -> SpooledObject:
        """Write `data` durably (fsync). Raises `StorageUnavailable` if the disk fails.

        The uploader ignores the file until `enqueue`.
        """
        facts = {
            "key": stored.key,
            "content_type": stored.content_type,
            "record": dict(stored.record),
            "sha256": stored.etag,
            "overwrite": overwrite,
        }
        content = json.dumps(facts).encode() + b"\n" + data
        # The time comes first, so that file names sort by age.
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

    def enqueue(self, spooled: SpooledObject) -> None:
        """Queue a written file for upload."""
        with self._lock:
            self._queued[spooled.path] = spooled
            self._latest[spooled.stored.key] = spooled

    def read(self, spooled: SpooledObject) -> bytes:
        """Return the image bytes. Raises `NotFound` if the file is gone, `StorageRefused` if it is unreadable."""
        try:
            return spooled.path.read_bytes().partition(b"\n")[2]
        except FileNotFoundError as error:
            raise NotFound("There is no picture under this name.") from error
        except OSError as error:
            raise StorageRefused(f"The waiting picture cannot be read ({error.strerror}).") from error

    def drop(self, spooled: SpooledObject) -> None:
        """Remove an object and its file."""
        self._forget(spooled)
        with suppress(OSError):  # gone already, or retried at the next start
            spooled.path.unlink()

    def reject(self, spooled: SpooledObject, reason: str, *, caller_informed: bool = False) -> None:
        """Remove an object from the queue and move its file to the dead letters.

        `caller_informed`: the caller knows that the store rejected it, so this server does not serve it.
        """
        _log.error(
            "the storage rejects a picture; it is moved to the dead letters", name=spooled.stored.key, reason=reason
        )
        self._forget(spooled)
        path = self.dead_letters.add(spooled.path, reason, caller_informed=caller_informed)
        if path is not None and not caller_informed:
            self._rejected[spooled.stored.key] = replace(spooled, path=path)

    def discard_rejected(self, key: str) -> None:
        """Delete the dead letter of a key whose object was deleted or replaced."""
        spooled = self._rejected.pop(key, None)
        for letter in self.dead_letters.list_all() if spooled is not None else ():
            if letter.key == key:
                with suppress(OSError):
                    self.dead_letters.drop(letter)

    def enqueue_retried(self) -> None:
        """Queue the files that an operator retried, see `DeadLetters.retry`."""
        with suppress(OSError):
            for path in sorted(self._folder.glob(f"*{RETRIED}")):
                again = path.with_suffix(".spool")
                with suppress(OSError):  # another process was faster, or the name is taken
                    path.replace(again)
                    if (spooled := self._load_or_reject(again)) is not None:
                        self._rejected.pop(spooled.stored.key, None)
                        self.enqueue(spooled)

    @contextmanager
    def _translated_errors(self) -> Iterator[None]:
        """Raise `OSError` as `StorageUnavailable`, without paths."""
        try:
            yield
        except OSError as error:
            self._disk.record_failure(error)
            reason = os.strerror(error.errno) if error.errno else type(error).__name__
            raise StorageUnavailable(f"DATA_DIR cannot keep pictures ({reason}).", retry_after=30) from error

    def _forget(self, spooled: SpooledObject) -> None:
        with self._lock:
            self._queued.pop(spooled.path, None)
            if self._latest.get(spooled.stored.key) == spooled:
                del self._latest[spooled.stored.key]

    def _load_or_reject(self, path: Path) -> SpooledObject | None:
        """Load a file of an earlier run; move an unreadable file to the dead letters and return `None`."""
        try:
            return _load_file(path)
        except (OSError, ValueError, RecursionError) as error:
            reason = os.strerror(error.errno or 0) if isinstance(error, OSError) else str(error)
            _log.error(
                "a spooled picture cannot be read; it is moved to the dead letters", file=path.name, reason=reason
            )
            self.dead_letters.add(path, f"It could not be read: {reason}.", caller_informed=True)
            return None


def _load_file(path: Path) -> SpooledObject:
    """Load and verify a spool file. Raises `OSError` and `ValueError`."""
    facts, size = verify_spool_file(path)
    stored = StoredObject(facts["key"], size, facts["sha256"], facts["content_type"], facts["record"], waiting=True)
    return SpooledObject(path, stored, facts["overwrite"], path.stat().st_size)


def _remove_stale_part(path: Path) -> None:
    """Remove a partial file older than 10 minutes; another process may still write a newer one."""
    with suppress(OSError):  # gone, or a folder
        if time.time() - path.lstat().st_mtime > _PART_SECONDS:
            path.unlink()


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable (fsync of the folder, where the system supports it)."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
