"""Checks whether a folder's disk accepts new files: free space, permissions, and errors of earlier writes."""

from __future__ import annotations

import errno
import os
import shutil
import threading
import time
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

# With less free space than this, no new file is accepted.
MIN_FREE_BYTES = 16 * 2**20
# Errors of a disk, as opposed to errors of one file name.
DISK_ERRNOS = frozenset(
    (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ENODEV, errno.ESTALE, errno.EMFILE, errno.ENFILE)
)
_PROBE_BYTES = 65_536
_PROBE_INTERVAL = 1.0


class Disk:
    """The disk under `folder`. After a failed write it counts as broken until a small test file can be written.

    Thread-safe.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._error: OSError | None = None
        self._probed_at = 0.0
        self._lock = threading.Lock()

    def check(self) -> None:
        """Raise `OSError` if a new file would fail. A broken disk is probed once a second."""
        if shutil.disk_usage(self._folder).free < MIN_FREE_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if not os.access(self._folder, os.W_OK | os.X_OK):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        with self._lock:
            if self._error is None:
                return
            if time.monotonic() - self._probed_at >= _PROBE_INTERVAL:
                self._probed_at = time.monotonic()
                self._error = self._probe()
            if self._error is not None:
                raise self._error

    def record_failure(self, error: OSError) -> None:
        """Record the error of a failed write; errors of one file name are ignored."""
        if error.errno in DISK_ERRNOS:
            with self._lock:
                if self._error is None:  # a later error must not postpone the next probe
                    self._error, self._probed_at = error, time.monotonic()

    def _probe(self) -> OSError | None:
        path = self._folder / f"{uuid4().hex}.part"
        try:
            with path.open("xb") as file:
                file.write(bytes(_PROBE_BYTES))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            return error
        finally:
            with suppress(OSError):
                path.unlink()
        return None
