"""A bucket that is a folder: atomic writes, content type and record kept beside. Knows no URLs."""

from __future__ import annotations

import errno
import hashlib
import json
import mimetypes
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from uuid import uuid4

from stable_diffusion_server.errors import InvalidInput, NotFound, StorageUnavailable
from stable_diffusion_server.orders import Stored

_NAME_FAULTS = {
    errno.ENAMETOOLONG: "has a part that is too long for a folder on disk (255 bytes is usual)",
    errno.ENOTDIR: "uses a stored picture's name as a folder",
    errno.EISDIR: "is the name of a folder that is there already",
}


class LocalBucket:
    """Objects in `root`/objects under their keys, facts about them in `root`/records, half-written ones in `root`/tmp.

    Keys are taken as cleaned by `bucket_api.object_key`. Several processes may share the folder: `create` is
    decided by the file system (link fails where a name exists).
    """

    def __init__(self, root: Path) -> None:
        self._objects = root / "objects"
        self._records = root / "records"
        self._unfinished = root / "tmp"

    def open(self) -> None:
        """Make the folders. Raises `StorageUnavailable` when they cannot be made or written to."""
        with _told_as_ours():
            for folder in (self._objects, self._records, self._unfinished):
                folder.mkdir(parents=True, exist_ok=True)
                if not os.access(folder, os.W_OK):
                    raise PermissionError(errno.EACCES, "not writable")

    def stat(self, key: str) -> Stored | None:
        """The object under `key`, or `None`; an empty file is no object, since no picture is empty."""
        with _told_as_ours():
            try:
                found = self.path(key).lstat()
            except (FileNotFoundError, NotADirectoryError):
                return None
            if not stat.S_ISREG(found.st_mode) or found.st_size == 0:
                return None
            facts = self._read_facts(key)
        if facts is not None and facts.size == found.st_size:
            return facts
        # Put there by hand, or its facts were lost: still an object, of which only the file itself is known.
        etag = hashlib.sha256(f"{found.st_mtime_ns}-{found.st_size}".encode()).hexdigest()
        content_type = mimetypes.guess_type(key)[0] or "application/octet-stream"
        return Stored(key, found.st_size, etag, content_type, {})

    def create(self, key: str, data: bytes, content_type: str, record: Mapping[str, str]) -> tuple[Stored, bool]:
        """Store `data` if `key` is absent; the first of several writers wins and the others get what it stored."""
        with _told_as_ours(), self._written(data) as finished:
            target = self.path(key)
            target.parent.mkdir(parents=True, exist_ok=True)
            for _ in range(2):
                try:
                    os.link(finished, target)
                except FileExistsError:
                    if (stored := self.stat(key)) is not None:
                        return stored, False
                    self._clear_husk(target)
                else:
                    return self._keep_facts(key, data, content_type, record), True
        raise StorageUnavailable("The folder changed while a picture was being stored.")

    def overwrite(self, key: str, data: bytes, content_type: str, record: Mapping[str, str]) -> Stored:
        """Store `data` under `key`; a reader sees the old object or the new one, whole."""
        with _told_as_ours(), self._written(data) as finished:
            target = self.path(key)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(finished, target)
            return self._keep_facts(key, data, content_type, record)

    def read(self, key: str) -> bytes:
        """The object's bytes. Raises `NotFound`."""
        with _told_as_ours():
            try:
                return self.path(key).read_bytes()
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
                raise NotFound("There is no picture under this name.") from error

    def path(self, key: str) -> Path:
        """Where the object's file lies, for a server that can send files by itself.

        Raises `NotFound` for a key that leads out of the folder, by a symbolic link in it or otherwise.
        """
        target = self._objects / key
        if not target.parent.resolve().is_relative_to(self._objects.resolve()):
            raise NotFound("There is no picture under this name.")
        return target

    @contextmanager
    def _written(self, data: bytes) -> Iterator[Path]:
        """A file of its own in the same file system with `data` safely on disk; gone afterwards."""
        path = self._unfinished / uuid4().hex
        try:
            with path.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield path
        finally:
            path.unlink(missing_ok=True)

    def _keep_facts(self, key: str, data: bytes, content_type: str, record: Mapping[str, str]) -> Stored:
        stored = Stored(key, len(data), hashlib.sha256(data).hexdigest(), content_type, dict(record))
        target = self._records / key
        target.parent.mkdir(parents=True, exist_ok=True)
        with self._written(json.dumps(asdict(stored)).encode()) as finished:
            os.replace(finished, target)
        return stored

    def _read_facts(self, key: str) -> Stored | None:
        try:
            return Stored(**json.loads((self._records / key).read_bytes()))
        except (OSError, ValueError, TypeError):
            return None

    @staticmethod
    def _clear_husk(target: Path) -> None:
        """Remove what holds a name and is no object (an empty file left by a crash of the disk)."""
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, "is a folder")
        target.unlink(missing_ok=True)


@contextmanager
def _told_as_ours() -> Iterator[None]:
    """Turn the operating system's errors into ours: a name it cannot hold is the caller's, the rest the storage's."""
    try:
        yield
    except OSError as error:
        if (why := _NAME_FAULTS.get(error.errno or 0)) is not None:
            raise InvalidInput(f"save_path {why}.", field="save_path") from error
        reason = os.strerror(error.errno) if error.errno else type(error).__name__
        raise StorageUnavailable(f"The folder of pictures cannot be used ({reason}).") from error
