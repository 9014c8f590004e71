"""Stores the images that the bucket rejected, with the reasons, until an operator retries or drops them."""

from __future__ import annotations

import hashlib
import json
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

_log = structlog.get_logger(__name__)

# Suffix of retried files in the spool folder; a running server, or the next one, queues them.
RETRIED = ".retry"
_ENDING = ".spool"
_HEAD_BYTES = 65_536
_MAX_LETTERS = 1000


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """One rejected object. `caller_informed`: the caller got an error instead of a URL. `size`: bytes on disk."""

    path: Path
    key: str
    reason: str
    caller_informed: bool
    size: int

    @property
    def id(self) -> str:
        """The id in the `spool` commands."""
        return self.path.name.removesuffix(_ENDING)


class DeadLetters:
    """The folder of dead letters; the first object creates it. Thread-safe; other processes may change it too.

    It holds at most `most` objects and `max_bytes` in total. It evicts the oldest first, and objects whose callers know
    of the rejection before all others.
    """

    def __init__(self, folder: Path, max_bytes: int, most: int = _MAX_LETTERS) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._most = most
        self._lock = threading.Lock()

    def add(self, path: Path, reason: str, *, caller_informed: bool = False) -> Path | None:
        """Move a file here, with the reason; return its new path, or `None` if the move fails."""
        target = self._folder / path.name
        with self._lock:
            try:
                self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                path.replace(target)
                self._write_sidecar(
                    target, {"reason": reason, "caller_informed": caller_informed, "refused_at": round(time.time(), 3)}
                )
            except OSError as error:
                _log.warning(
                    "a rejected image cannot be moved to the dead letters", file=path.name, reason=error.strerror
                )
                return None
            self._evict_oldest()
        return target

    def __len__(self) -> int:
        """Number of dead letters."""
        with suppress(OSError):
            return sum(path.suffix != ".reason" for path in self._folder.iterdir())
        return 0

    def list_all(self) -> list[DeadLetter]:
        """Return all dead letters, oldest first."""
        with suppress(OSError):
            paths = sorted(path for path in self._folder.iterdir() if path.suffix != ".reason")
            return [letter for letter in map(self._read, paths) if letter is not None]
        return []

    def retry(self, letter: DeadLetter) -> None:
        """Move a letter back to the spool. Raises `OSError`, and `ValueError` if the file is damaged."""
        verify_spool_file(letter.path)
        target = self._folder.with_name("spool") / f"{letter.id}{RETRIED}"
        if target.exists():
            raise ValueError("another of this id is being retried")
        letter.path.replace(target)
        _sidecar(letter.path).unlink(missing_ok=True)

    def drop(self, letter: DeadLetter) -> None:
        """Delete a letter. Raises `OSError`."""
        if letter.path.is_dir() and not letter.path.is_symlink():
            letter.path.rmdir()
        else:
            letter.path.unlink(missing_ok=True)
        _sidecar(letter.path).unlink(missing_ok=True)

    def _write_sidecar(self, target: Path, why: dict[str, Any]) -> None:
        """Write the reason into a file beside the object."""
        with suppress(OSError):  # a full disk loses the reason, not the object
            _sidecar(target).write_text(json.dumps(why))

    def _read(self, path: Path) -> DeadLetter | None:
        why: dict[str, Any] = {}
        with suppress(OSError, ValueError):
            why = _parse_object(_read_first_line(_sidecar(path)))
        key = ""
        with suppress(OSError, ValueError):
            key = read_header(path)["key"]
        with suppress(FileNotFoundError):
            size = path.lstat().st_size
            return DeadLetter(path, key, str(why.get("reason", "unknown")), bool(why.get("caller_informed")), size)
        return None

    def _evict_oldest(self) -> None:
        letters = sorted(self.list_all(), key=lambda letter: not letter.caller_informed)
        size = sum(letter.size for letter in letters)
        while letters and (len(letters) > self._most or size > self._max_bytes):
            oldest = letters.pop(0)
            size -= oldest.size
            _log.warning("too many dead letters: the oldest is removed", name=oldest.key, reason=oldest.reason)
            with suppress(OSError):
                self.drop(oldest)


def read_header(path: Path) -> dict[str, Any]:
    """Return the JSON header line of a spool file. Raises `OSError`, and `ValueError` for other files."""
    line = _read_first_line(path)
    facts = _parse_object(line) if line.endswith(b"\n") else None
    kinds = {"key": str, "content_type": str, "record": dict, "sha256": str, "overwrite": bool}
    if not isinstance(facts, dict) or not all(isinstance(facts.get(name), kind) for name, kind in kinds.items()):
        raise ValueError("it does not begin with the facts of an object")
    if not facts["key"] or not all(isinstance(text, str) for pair in facts["record"].items() for text in pair):
        raise ValueError("its key or its record is none")
    return facts


def verify_spool_file(path: Path) -> tuple[dict[str, Any], int]:
    """Check the SHA-256; return the header and the number of image bytes. Raises `OSError` and `ValueError`."""
    facts, size, content = read_header(path), 0, hashlib.sha256()
    with path.open("rb") as file:
        file.readline(_HEAD_BYTES)
        for part in _parts(file.read):
            content.update(part)
            size += len(part)
    if content.hexdigest() != facts["sha256"]:
        raise ValueError("its bytes are not those it was given")
    return facts, size


def _read_first_line(path: Path) -> bytes:
    """Return at most 64 KiB of the first line. Raises `OSError`, and `ValueError` if it is not a regular file."""
    if not stat.S_ISREG(path.lstat().st_mode):
        raise ValueError("it is no file")
    with path.open("rb") as file:
        return file.readline(_HEAD_BYTES)


def _parse_object(line: bytes) -> dict[str, Any]:
    """Parse a JSON object. Raises `ValueError`, also if it is nested too deep."""
    try:
        return dict(json.loads(line))
    except (RecursionError, TypeError) as error:
        raise ValueError("it does not begin with the facts of an object") from error


def _parts(read: Callable[[int], bytes]) -> Iterator[bytes]:
    while part := read(1 << 20):
        yield part


def _sidecar(path: Path) -> Path:
    return path.with_name(f"{path.name}.reason")
