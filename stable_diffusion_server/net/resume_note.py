"""The note beside a partial file: what it is a part of, so that a later process can continue it."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class ResumeNote:
    """What a partial file is a part of.

    Attributes:
        source: SHA-256 of the URL, which may hold a token.
        size: Bytes of the whole file, if the server says so.
        validator: The strong ETag, or the time of the last change, which `If-Range` takes; empty without one.
        digest: The expected digest; empty if none is known.
    """

    source: str
    size: int | None
    validator: str
    digest: str


def note_path(partial: Path) -> Path:
    """Where the note of a partial file lies."""
    return partial.with_name(f"{partial.name}.json")


def write_note(partial: Path, note: ResumeNote) -> None:
    """Write the note of a partial file. Raises `OSError`."""
    path = note_path(partial)
    new = path.with_suffix(".new")
    new.write_text(json.dumps(asdict(note)))
    os.replace(new, path)


def read_note(partial: Path) -> ResumeNote | None:
    """The note of a partial file; `None` if there is none that can be read."""
    try:
        note = ResumeNote(**json.loads(note_path(partial).read_text()))
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    texts = all(isinstance(text, str) for text in (note.source, note.validator, note.digest))
    return note if texts and (note.size is None or type(note.size) is int) else None
