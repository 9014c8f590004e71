"""A file that is being downloaded: what is there already, and its digest."""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from stable_diffusion_server.net.resume_note import ResumeNote, note_path, read_note, write_note

_CHUNK = 8 * 2**20
_SHA256 = 64


class PartialFile:
    """The partial file at `path`, made if need be, no link followed; its note lies beside it. Raises `OSError`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
        self._file = os.fdopen(os.open(path, flags, 0o666), "r+b")
        self._content = hashlib.sha256()
        self.position = 0
        self.note: ResumeNote | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    @property
    def is_complete(self) -> bool:
        """Whether as many bytes are there as the server announced."""
        return self.note is not None and self.note.size is not None and self.position == self.note.size

    def take_up(self, source: str, digest: str) -> None:
        """Continue after the bytes that are there, if they are of this source or digest and can be told from others."""
        note = read_note(self._path)
        size = os.fstat(self._file.fileno()).st_size
        if note is None or not (note.validator or note.digest) or (note.size is not None and size > note.size):
            return
        if (note.source, note.digest) != (source, digest) and not (digest and note.digest == digest):
            return
        while chunk := self._file.read(_CHUNK):
            self._content.update(chunk)
            self.position += len(chunk)
        self.note = note

    def begin(self, note: ResumeNote) -> None:
        """Drop what is there, and write the note for what comes."""
        self.drop()
        write_note(self._path, note)
        self.note = note

    def drop(self) -> None:
        """Drop what is there."""
        self._file.seek(0)
        self._file.truncate()
        self._content, self.position, self.note = hashlib.sha256(), 0, None

    def write(self, chunk: bytes) -> None:
        """Add bytes at the end."""
        self._file.write(chunk)
        self._content.update(chunk)
        self.position += len(chunk)

    def sync(self) -> None:
        """Bring all bytes to the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def digest_like(self, digest: str) -> str:
        """The digest of what is there in the way that `digest` was made: SHA-256, or git's SHA-1 of a blob."""
        return self._content.hexdigest() if len(digest) in (0, _SHA256) else git_blob_id(self._path)


def git_blob_id(path: Path) -> str:
    """The SHA-1 by which git and the hub name the content of a small file. Raises `OSError`."""
    content = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            content.update(chunk)
    return content.hexdigest()


def finish(partial: Path, target: Path) -> None:
    """Rename a complete file to its name, and forget its note. Raises `OSError`."""
    os.replace(partial, target)
    discard(partial)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def discard(partial: Path) -> None:
    """Delete a partial file and its note, if they are there."""
    for path in (partial, note_path(partial)):
        with suppress(FileNotFoundError):
            path.unlink()
