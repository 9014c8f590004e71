"""Local bucket: a folder with atomic writes; a second file holds content type and record of each object."""

from __future__ import annotations

import errno
import hashlib
import json
import mimetypes
import os
import stat
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from uuid import uuid4

from filelock import FileLock

from stable_diffusion_server.errors import InvalidInput, NotFound, StorageUnavailable
from stable_diffusion_server.files import Disk
from stable_diffusion_server.imaging import is_complete_file, is_image_object
from stable_diffusion_server.storage.base import Bucket
from stable_diffusion_server.storage.existence_cache import ExistenceCache
from stable_diffusion_server.types import StoredObject

# Limit of a file name on Linux, macOS and Windows.
_SEGMENT_MAX_BYTES = 255
_NAME_FAULTS = {
    errno.ENAMETOOLONG: f"has a part longer than {_SEGMENT_MAX_BYTES} bytes, which a folder on disk cannot hold",
    errno.ENOTDIR: "uses a stored picture's name as a folder",
    errno.EEXIST: "uses a stored picture's name as a folder",
    errno.EISDIR: "is the name of a folder that is there already",
    errno.ELOOP: "is in a folder that is a link to itself",
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "is in a folder that cannot be written to"),
    **dict.fromkeys((errno.EINVAL, errno.EILSEQ), "is none that this disk can hold"),
}
# The bucket notices files that another program removed after this time.
_CACHE_SIZE, _CACHE_SECONDS = 10_000, 2.0
_DIGEST_CACHE_SIZE = 20_000


class LocalBucket(Bucket):
    """Objects in `root`/objects under their keys, their records in `root`/records, temporary files in `root`/tmp.

    Keys come from `object_key`. Several processes may share the folder: a lock file orders the writers and keeps an
    object and its record consistent for readers. `stat` results are cached for 2 s, so that bursts need no disk access.
    """

    def __init__(self, root: Path) -> None:
        self._cache = ExistenceCache(_CACHE_SIZE, _CACHE_SECONDS)
        self._objects = root / "objects"
        self._records = root / "records"
        self._staging = root / "tmp"
        self._disk = Disk(self._staging)
        self._thread_lock = threading.Lock()

    def open(self) -> None:
        """Create the folders. Raises `StorageUnavailable` if they cannot be created or written to."""
        with self._translated_errors():
            for folder in (self._objects, self._records, self._staging):
                folder.mkdir(parents=True, exist_ok=True)
                if not os.access(folder, os.W_OK):
                    raise PermissionError(errno.EACCES, "not writable")

    def close(self) -> None:
        """Do nothing: there is nothing to close."""

    def health(self) -> str | None:
        """Return why the disk is unusable, for example because it is full; `None` if it is usable."""
        try:
            self.check_capacity()
        except StorageUnavailable as error:
            return error.detail
        return None

    def check_capacity(self) -> None:
        """Raise `StorageUnavailable` while the disk is full or failing."""
        with self._translated_errors():
            self._disk.check()

    def stat(self, key: str) -> StoredObject | None:
        """Return the complete object or `None`. Raises `InvalidInput` for a folder's name or a name too long."""
        with self._translated_errors():
            since = self._cache.changes
            return self._cache.remember(key, self._find_consistent(key), since)

    def cached(self, key: str) -> StoredObject | None:
        """Return the object if a call found it less than 2 s ago."""
        return self._cache.get(key)

    def create(self, key: str, data: bytes, content_type: str, record: Mapping[str, str]) -> tuple[StoredObject, bool]:
        """Store `data` if `key` is absent; of concurrent writers the first wins and the others get its object."""
        stored = _describe(key, data, content_type, record)
        with self._staged_object(data, stored) as (finished, facts):
            if (there := self._find(key)) is not None:
                return there, False
            with self._translated_name_errors():
                target = self._prepare_target(key)
                target.unlink(missing_ok=True)  # an empty or damaged file, which is not an object
                os.link(finished, target)
                os.replace(facts, self._records / key)
            self._cache.remember(key, stored)
        return stored, True

    def overwrite(self, key: str, data: bytes, content_type: str, record: Mapping[str, str]) -> StoredObject:
        """Store `data` under `key`; readers get the old object or the new one."""
        stored = _describe(key, data, content_type, record)
        with self._staged_object(data, stored) as (finished, facts):
            self._find(key)  # raises if the disk does not distinguish this key from another
            with self._translated_name_errors():
                os.replace(finished, self._prepare_target(key))
                os.replace(facts, self._records / key)
            self._cache.remember(key, stored)
        return stored

    def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        """Return bytes `start` (inclusive) to `end` (exclusive). Raises `NotFound`."""
        with self._translated_errors():
            try:
                with self.path(key).open("rb") as file:
                    file.seek(start)
                    return file.read(-1 if end is None else max(0, end - start))
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
                self._cache.remember(key, None)
                raise NotFound("There is no picture under this name.") from error

    def delete(self, key: str) -> None:
        """Remove the object and its record, and folders that become empty."""
        with self._translated_errors(), self._locked():
            self._cache.remember(key, None)
            for root in (self._objects, self._records):
                path = self.path(key) if root is self._objects else root / key
                try:
                    path.unlink()
                    for folder in path.parents:
                        if folder == root:
                            break
                        folder.rmdir()
                except (FileNotFoundError, NotADirectoryError):
                    continue
                except OSError as error:
                    if error.errno not in (errno.ENOTEMPTY, errno.EISDIR, errno.EPERM, errno.EEXIST):
                        raise

    def list(self, prefix: str = "") -> Iterator[str]:
        """Yield the keys that start with `prefix`, in folder order."""
        top = self._objects / prefix.rpartition("/")[0]
        if not top.resolve().is_relative_to(self._objects.resolve()):
            return
        for folder, below, files in os.walk(top):
            below.sort()
            for name in sorted(files):
                path = Path(folder, name)
                key = path.relative_to(self._objects).as_posix()
                if key.startswith(prefix) and not path.is_symlink() and path.stat().st_size:
                    yield key

    def path(self, key: str) -> Path:
        """Return the path of the object's file, for sendfile.

        Raises `NotFound` for a key that leads out of the folder, for example by a symbolic link.
        """
        target = self._objects / key
        if not target.parent.resolve().is_relative_to(self._objects.resolve()):
            raise NotFound("There is no picture under this name.")
        return target

    @contextmanager
    def _translated_errors(self) -> Iterator[None]:
        """Raise `OSError` as `StorageUnavailable`, without paths."""
        try:
            yield
        except OSError as error:
            self._disk.record_failure(error)
            reason = os.strerror(error.errno) if error.errno else type(error).__name__
            raise StorageUnavailable(f"The folder of pictures cannot be used ({reason}).", retry_after=30) from error

    @contextmanager
    def _staged_object(self, data: bytes, stored: StoredObject) -> Iterator[tuple[Path, Path]]:
        """Write the object and its record to durable temporary files, then hold the lock during the block."""
        with (
            self._translated_errors(),
            self._staged_file(data) as finished,
            self._staged_file(json.dumps(asdict(stored)).encode()) as facts,
            self._locked(),
        ):
            yield finished, facts

    @contextmanager
    def _staged_file(self, data: bytes) -> Iterator[Path]:
        """Write `data` to a durable temporary file in the same file system; remove it after the block."""
        path = self._staging / uuid4().hex
        try:
            with path.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield path
        finally:
            path.unlink(missing_ok=True)

    def _prepare_target(self, key: str) -> Path:
        """Return the path for writing an object; create the folders of object and record."""
        target = self._checked_path(key)
        for path in (target, self._records / key):
            path.parent.mkdir(parents=True, exist_ok=True)
        return target

    @contextmanager
    def _translated_name_errors(self) -> Iterator[None]:
        """Raise errors caused by the caller's key as `InvalidInput`; other errors pass unchanged.

        If the bucket's own folders are not writable, the bucket is the cause, not the key.
        """
        try:
            yield
        except OSError as error:
            why = _NAME_FAULTS.get(error.errno or 0)
            if why is None or not self._is_writable():
                raise
            raise InvalidInput(f"save_path {why}.", field="save_path") from error

    def _is_writable(self) -> bool:
        return all(os.access(folder, os.W_OK | os.X_OK) for folder in (self._objects, self._records, self._staging))

    def _checked_path(self, key: str) -> Path:
        """Return the path of a key, if it may name an object. Raises `OSError`."""
        if max(map(len, key.encode().split(b"/"))) > _SEGMENT_MAX_BYTES:
            # Check here, because a missing folder would hide the error until the image is generated.
            raise OSError(errno.ENAMETOOLONG, "too long")
        target = self.path(key)
        if target.is_dir() and not target.is_symlink():
            raise IsADirectoryError(errno.EISDIR, "is a folder")
        return target

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Lock object and record for replacement, across threads and processes.

        Threads take a thread lock first, because FileLock polls every 50 ms, which under load kept all threads asleep.
        """
        with self._thread_lock, FileLock(self._staging / ".lock", thread_local=False, is_singleton=False):
            yield

    def _find_consistent(self, key: str) -> StoredObject | None:
        found = self._find(key)
        if found.record if found is not None else not (self._records / key).is_file():
            return found
        # No matching record: a writer may be between its two renames, so look again under the lock.
        with self._locked():
            return self._find(key)

    def _is_whole_image(self, key: str, size: int) -> bool:
        """Return whether the file under `key` has the start and the end of an image file."""
        with suppress(OSError), (self._objects / key).open("rb") as file:
            head = file.read(12)
            file.seek(max(0, size - 12))
            return is_complete_file(head, file.read(12), size)
        return False

    def _check_folder_of(self, key: str) -> None:
        """Raise `InvalidInput` for a key in a read-only folder of a writable bucket, before the image is generated."""
        folder = next(path for path in (self._objects / key).parents if path.exists())
        if not os.access(folder, os.W_OK | os.X_OK) and self._is_writable():
            raise InvalidInput(f"save_path {_NAME_FAULTS[errno.EACCES]}.", field="save_path")

    def _find(self, key: str) -> StoredObject | None:
        try:
            with self._translated_name_errors():
                found = self._checked_path(key).lstat()
        except FileNotFoundError:
            if not self._objects.is_dir():
                raise
            self._check_folder_of(key)
            return None
        if not stat.S_ISREG(found.st_mode) or found.st_size == 0:
            return None
        try:
            facts = StoredObject(**json.loads((self._records / key).read_bytes()))
        except (OSError, ValueError, TypeError):
            facts = None
        if (
            facts is not None
            and facts.size == found.st_size
            and _sha256_or_empty(self._objects / key, found) == facts.etag
        ):
            if facts.key != key:
                raise InvalidInput(
                    "save_path is taken in another letter case, which this disk cannot tell apart.",
                    field="save_path",
                )
            return facts if facts.is_complete else None
        content_type = mimetypes.guess_type(key)[0] or "application/octet-stream"
        if (facts is not None or is_image_object(key, "")) and not self._is_whole_image(key, found.st_size):
            return None  # truncated or garbage
        # A file copied here by hand, or a lost record: still an object, described by the file alone.
        etag = hashlib.sha256(f"{found.st_mtime_ns}-{found.st_size}".encode()).hexdigest()
        return StoredObject(key, found.st_size, etag, content_type, {})


def _sha256_or_empty(path: Path, found: os.stat_result) -> str:
    """Return the SHA-256 of a file, cached until the file changes; empty if it cannot be read."""
    try:
        return _cached_sha256(path, (found.st_size, found.st_ino, found.st_mtime_ns))
    except OSError:
        return ""


@lru_cache(_DIGEST_CACHE_SIZE)
def _cached_sha256(path: Path, seen: tuple[int, int, int]) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _describe(key: str, data: bytes, content_type: str, record: Mapping[str, str]) -> StoredObject:
    return StoredObject(key, len(data), hashlib.sha256(data).hexdigest(), content_type, dict(record))
