"""Whether the disk under a folder takes files: room, rights, and what the last failed write told. Knows no objects."""

from __future__ import annotations

import errno
import os
import shutil
import threading
import time
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

# Below this much free disk nothing more is taken in.
MIN_FREE_BYTES = 16 * 2**20
# What is wrong with a disk, and not with the name of a file on it.
DISK_ERRNOS = frozenset(
    (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ENODEV, errno.ESTALE, errno.EMFILE, errno.ENFILE)
)
_TRIED_BYTES = 65_536
_TRIED_EVERY = 1.0


class Disk:
    """The disk under `folder`. After a write that failed it counts as broken until a small file can be written again.

    Safe from any thread.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._fault: OSError | None = None
        self._tried = 0.0
        self._lock = threading.Lock()

    def check(self) -> None:
        """Raises `OSError` while a new file would not find room. A broken disk is tried once a second."""
        if shutil.disk_usage(self._folder).free < MIN_FREE_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if not os.access(self._folder, os.W_OK | os.X_OK):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        with self._lock:
            if self._fault is None:
                return
            if time.monotonic() - self._tried >= _TRIED_EVERY:
                self._tried = time.monotonic()
                self._fault = self._try()
            if self._fault is not None:
                raise self._fault

    def record_failure(self, error: OSError) -> None:
        """Note an error that a write met; those that are of its name are no matter of the disk."""
        if error.errno in DISK_ERRNOS:
            with self._lock:
                if self._fault is None:  # else the next try would be put off for as long as anyone asks
                    self._fault, self._tried = error, time.monotonic()

    def _try(self) -> OSError | None:
        path = self._folder / f"{uuid4().hex}.part"
        try:
            with path.open("xb") as file:
                file.write(bytes(_TRIED_BYTES))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            return error
        finally:
            with suppress(OSError):
                path.unlink()
        return None
