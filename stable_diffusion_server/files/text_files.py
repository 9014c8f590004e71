"""Small text files of the operator's, read when a request needs them, and again when they changed."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import Generic, TypeVar

from cachetools import LRUCache

T = TypeVar("T")

# A file changed more recently than this may change again without a new timestamp.
_UNSETTLED_SECONDS = 2.0
# Bytes of the files whose content is kept, each counted as 1 KiB at least; as objects they take more.
_CACHE_BYTES, _LEAST_BYTES = 8_388_608, 1024


class UnreadableText(ValueError):
    """A text file cannot be used. The message is the end of a sentence about it: `has more than 5 bytes`."""


class TextFiles(Generic[T]):
    """Reads text files of at most `largest` bytes, and keeps what `parse` makes of their content. Thread-safe.

    Files are UTF-8, also with a byte order mark. `parse` raises `UnreadableText` for a content that it refuses. Results
    are kept, up to a total size, by a file's device, inode, size and times, so the next `read` sees a change.
    """

    def __init__(self, parse: Callable[[str], T], largest: int) -> None:
        self._parse = parse
        self._largest = largest
        self._read: LRUCache[tuple[int, ...], tuple[int, T]] = LRUCache(
            max(_CACHE_BYTES, largest), getsizeof=lambda entry: max(entry[0], _LEAST_BYTES)
        )
        self._lock = Lock()

    def read(self, file: Path) -> T:
        """Return the parsed content. Follows links, never blocks on a pipe or device. Raises `UnreadableText`."""
        try:
            facts = os.stat(file)
            with self._lock:
                known = self._read.get(_identity(facts))
            if known is not None:
                return known[1]
            content, facts = self._content(file, facts)
        except OSError as error:
            raise UnreadableText(f"cannot be read: {error.strerror}") from error
        parsed = self._parse(_decoded(content))
        if time.time() - max(facts.st_mtime, facts.st_ctime) > _UNSETTLED_SECONDS:
            with self._lock:
                self._read[_identity(facts)] = len(content), parsed
        return parsed

    def _content(self, file: Path, facts: os.stat_result) -> tuple[bytes, os.stat_result]:
        """Return the bytes of a regular file, and its facts once it is open."""
        if stat.S_ISREG(facts.st_mode):
            with open(os.open(file, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0)), "rb") as source:
                facts = os.fstat(source.fileno())
                content = source.read(self._largest + 1) if stat.S_ISREG(facts.st_mode) else b""
        if not stat.S_ISREG(facts.st_mode):
            raise UnreadableText("is not a file")
        if len(content) > self._largest:
            raise UnreadableText(f"has more than {self._largest} bytes")
        return content, facts


def _decoded(content: bytes) -> str:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UnreadableText(f"is not UTF-8, at byte {error.start}") from error
    if "\0" in text:
        raise UnreadableText("has a zero byte, so it is not a text")
    return text


def _identity(facts: os.stat_result) -> tuple[int, ...]:
    return (facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns)
