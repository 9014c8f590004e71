"""Value types of the history: one generated image, and a search for images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class HistoryEntry:
    """A generated image. Field names are column names of the SQLite table.

    `caller` is the name of the API key, `drawn_at` seconds since 1970 (UTC), `record` the JSON-compatible provenance
    that `EMBED_METADATA=full` writes into the file. `number` increases in order of insertion; 0 before insertion.
    """

    key: str
    digest: str
    prompt: str
    model: str
    task: str
    seed: int
    width: int
    height: int
    caller: str
    drawn_at: float
    record: Mapping[str, object] = field(repr=False)
    number: int = 0


@dataclass(frozen=True, slots=True)
class HistoryQuery:
    """A search: key prefix, text within the prompt, model, request digest, and caller (`None`: all callers).

    Empty strings match everything. `before` is an entry number: only older entries are returned, at most `limit`.
    """

    prefix: str = ""
    text: str = ""
    model: str = ""
    before: int | None = None
    limit: int = 50
    caller: str | None = None
    digest: str = ""
