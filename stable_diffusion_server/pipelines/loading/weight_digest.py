"""Digests of weight files, cached on disk."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import structlog

from stable_diffusion_server.errors import ModelLoadError

_log = structlog.get_logger(__name__)

# Seconds after a change in which a file may change again without a new timestamp.
_SETTLED = 2.0
# Bytes from which reading is logged.
_LARGE = 1_000_000_000
_KEPT = 4096
# Bytes that are read at once; after each, a load may be ended.
_CHUNK = 8 * 2**20


def ignore_progress(share: float) -> None:
    """Ignore the share of a work that is done."""


class WeightDigests:
    """SHA-256 of files, cached in `file` by device, inode, size and times, so that a restart reads none again.

    Every write updates a file's ctime, which programs cannot set. `of` and `of_file` are for one thread at a time.
    """

    def __init__(self, file: Path | None = None, clock: Callable[[], float] = time.time) -> None:
        self._file = file
        self._clock = clock
        self._known: dict[str, str] = _read(file)
        self._fresh: dict[str, str] = {}

    def of(self, files: Mapping[str, Path], report: Callable[[float], None] = ignore_progress) -> str:
        """One digest of files by their names, 64 hexadecimal digits. Raises `ModelLoadError` for a missing file.

        It depends on names and contents, not on the place that links lead to. `report` receives the share that is read.
        """
        lacking = [file for file in files.values() if self._remembered(_facts_of(file)) is None]
        size = sum(file.stat().st_size for file in lacking)
        started = time.perf_counter()
        if size >= _LARGE:
            _log.info("reading weights to know them by their content", files=len(lacking), bytes=size)
        read = 0

        def count(amount: int) -> None:
            nonlocal read
            read += amount
            report(min(1.0, read / max(1, size)))

        lines = [f"{name}\0{self._digest(file, count)}\n" for name, file in sorted(files.items())]
        if size >= _LARGE:
            _log.info("weights were read", bytes=size, seconds=round(time.perf_counter() - started, 1))
        if lacking:
            self._keep()
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def remembered(self, files: Mapping[str, Path]) -> str | None:
        """The same digest if it is cached for every file. Thread-safe."""
        try:
            known = all(self._remembered(_facts_of(file)) is not None for file in files.values())
        except ModelLoadError:
            return None
        return self.of(files) if known else None

    def of_file(self, file: Path) -> str:
        """The SHA-256 of one file's content, 64 hexadecimal digits. Raises `ModelLoadError`."""
        lacking = self._remembered(_facts_of(file)) is None
        digest = self._digest(file)
        if lacking:
            self._keep()
        return digest

    def remembered_file(self, file: Path) -> str | None:
        """The same digest if it is cached and the file has not changed since."""
        try:
            return self._remembered(_facts_of(file))
        except ModelLoadError:
            return None

    def _remembered(self, key: str) -> str | None:
        return self._fresh.get(key) or self._known.get(key)

    def _digest(self, file: Path, count: Callable[[int], None] = lambda amount: None) -> str:
        key = _facts_of(file)
        if (known := self._remembered(key)) is not None:
            return known
        try:
            with file.open("rb") as source:
                content = hashlib.sha256()
                while chunk := source.read(_CHUNK):
                    content.update(chunk)
                    count(len(chunk))
                digest = content.hexdigest()
                changed = os.fstat(source.fileno()).st_ctime
        except OSError as error:
            raise ModelLoadError(f"{file.parent.name}/{file.name} cannot be read ({error.strerror}).") from error
        if _facts_of(file) != key:
            raise ModelLoadError(f"{file.parent.name}/{file.name} was changed while it was read; start again.")
        self._fresh[key] = digest
        if self._clock() - changed > _SETTLED:
            self._known[key] = digest
        return digest

    def _keep(self) -> None:
        if self._file is None:
            return
        kept = dict(list(self._known.items())[-_KEPT:])
        try:
            self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            new = self._file.with_suffix(".new")
            new.write_text(json.dumps(kept, indent=0))
            os.replace(new, self._file)
        except OSError as error:
            _log.warning("digests of weights cannot be kept; the next start reads them again", why=str(error))


def _facts_of(file: Path) -> str:
    """A key that changes whenever the file does."""
    try:
        facts = file.stat()
    except OSError as error:
        raise ModelLoadError(f"{file.parent.name}/{file.name} cannot be read ({error.strerror}).") from error
    return f"{facts.st_dev}:{facts.st_ino}:{facts.st_size}:{facts.st_mtime_ns}:{facts.st_ctime_ns}"


def _read(file: Path | None) -> dict[str, str]:
    if file is None or not file.exists():
        return {}
    try:
        read = json.loads(file.read_text())
        return {str(key): str(digest) for key, digest in read.items() if len(str(digest)) == 64}
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        _log.warning("remembered digests of weights cannot be read; the weights are", why=str(error))
        return {}
