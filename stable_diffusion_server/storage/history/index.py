"""SQLite index of generated images with full-text search, bounded in number and age."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import fields, replace
from pathlib import Path

import structlog

from stable_diffusion_server.errors import StorageUnavailable
from stable_diffusion_server.files import is_blocked, quarantine
from stable_diffusion_server.storage.history.entries import HistoryEntry, HistoryQuery

_log = structlog.get_logger(__name__)

_COLUMNS = tuple(part.name for part in fields(HistoryEntry) if part.name != "number")
# `words` is the case-folded prompt, since SQLite folds ASCII only. `drawn_words` is an FTS5 trigram index without
# positions (detail=none): it narrows a search to prompts with all trigrams of the text, and `instr` decides.
_TABLE = f"""
CREATE TABLE IF NOT EXISTS drawn (number INTEGER PRIMARY KEY AUTOINCREMENT, words, {", ".join(_COLUMNS)});
CREATE UNIQUE INDEX IF NOT EXISTS drawn_key ON drawn (key);
CREATE INDEX IF NOT EXISTS drawn_digest ON drawn (digest);
CREATE INDEX IF NOT EXISTS drawn_at ON drawn (drawn_at);
CREATE INDEX IF NOT EXISTS drawn_model ON drawn (model, number);
CREATE INDEX IF NOT EXISTS drawn_caller ON drawn (caller, number);
"""
_WORDS = """
CREATE VIRTUAL TABLE drawn_words USING fts5(
  words, content='drawn', content_rowid='number', tokenize='trigram case_sensitive 1', detail='none'
);
INSERT INTO drawn_words(drawn_words) VALUES ('rebuild');
CREATE TRIGGER drawn_added AFTER INSERT ON drawn BEGIN
  INSERT INTO drawn_words(rowid, words) VALUES (new.number, new.words);
END;
CREATE TRIGGER drawn_removed AFTER DELETE ON drawn BEGIN
  INSERT INTO drawn_words(drawn_words, rowid, words) VALUES ('delete', old.number, old.words);
END;
"""
_INDEXED = "SELECT count(*) FROM sqlite_master WHERE name IN ('drawn_words', 'drawn_added', 'drawn_removed')"
# Maximum number of trigrams per search: more trigrams hardly narrow the result.
_MOST_TRIGRAMS = 24
_ADD = f"INSERT INTO drawn (words, {', '.join(_COLUMNS)}) VALUES ({', '.join('?' * (len(_COLUMNS) + 1))})"  # noqa: S608  # column names of our own
_SHOW = f"SELECT number, {', '.join(_COLUMNS)} FROM drawn"  # noqa: S608  # column names of our own
_DELETE_OLDEST = "DELETE FROM drawn WHERE number IN (SELECT number FROM drawn ORDER BY number LIMIT ?)"
# More than are added, so that the index shrinks; few, because each deletion takes time.
_DELETED_AT_ONCE = 32
_SIZE_FACTS = ("page_count", "freelist_count", "page_size")
_MAX_BYTES = 4 * 2**30
# SQLite's integers have 64 bits with a sign.
_SIGNED = 2**63
_BUSY_SECONDS = 5.0
_FEW = 1000
_WITHIN = "key >= ? AND key < ?"
_WITHIN_UNINDEXED = "+key >= ? AND +key < ?"
_HELD = f"SELECT count(*) FROM (SELECT 1 FROM drawn WHERE {_WITHIN} LIMIT ?)"  # noqa: S608  # text of our own
_AFTER_ALL = "\U0010ffff"
_KINDS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("key", "digest", "prompt", "model", "task", "caller", "record"), str),
    **dict.fromkeys(("seed", "width", "height"), int),
    "drawn_at": (int, float),
}
# SQLite errors of a damaged or foreign file, as opposed to a locked file, an unreachable or a full disk.
_DAMAGE = (sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_FORMAT)


class HistoryIndex:
    """Holds the newest `max_entries` entries, one per key, none older than `max_age_seconds` (0: no age limit).

    Above `max_bytes`, which long prompts may reach earlier, it loses the oldest entries too.
    Safe from any thread and for several processes. All methods raise `StorageUnavailable` when the file is unusable.
    """

    def __init__(self, path: Path, max_entries: int, max_age_seconds: float, max_bytes: int = _MAX_BYTES) -> None:
        self._path = path
        self._max_entries = max_entries
        self._max_age_seconds = max_age_seconds
        self._max_bytes = max_bytes

    def open(self) -> None:
        """Create the table. Quarantine a damaged or foreign file: this loses the index, but no images."""
        try:
            self._create_schema()
        except sqlite3.DatabaseError as error:
            code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF
            if code not in _DAMAGE and not is_blocked(self._path):
                raise _unavailable(error) from error
            quarantine(self._path, str(error))
            self._create_schema()

    def add(self, entries: Sequence[HistoryEntry]) -> None:
        """Add entries, the newest last; an entry replaces the earlier entry of its key."""
        with self._transaction() as base:
            base.executemany("DELETE FROM drawn WHERE key = ?", [(entry.key,) for entry in entries])
            base.executemany(_ADD, [_to_row(entry) for entry in entries])
            oldest = base.execute(
                "SELECT number FROM drawn ORDER BY number DESC LIMIT 1 OFFSET ?", (self._max_entries,)
            )
            for (number,) in oldest.fetchall():
                base.execute("DELETE FROM drawn WHERE number <= ?", (number,))
            if self._max_age_seconds:
                base.execute("DELETE FROM drawn WHERE drawn_at < ?", (time.time() - self._max_age_seconds,))
            pages, free, size = (base.execute(f"PRAGMA {fact}").fetchone()[0] for fact in _SIZE_FACTS)
            if (pages - free) * size > self._max_bytes:
                base.execute(_DELETE_OLDEST, (_DELETED_AT_ONCE + len(entries),))

    def search(self, query: HistoryQuery) -> list[HistoryEntry]:
        """Return the matching entries, newest first."""
        folder, words = query.prefix, query.text.casefold()
        if "\0" in words:
            return []  # no prompt contains NUL, and FTS5 would stop reading there
        trigrams, within = _trigrams(words), (folder, folder + _AFTER_ALL)
        with self._transaction() as base:
            # The key index is fast for a small prefix, and slow for a prefix that matches nearly all rows.
            (held,) = base.execute(_HELD, (*within, _FEW)).fetchone()
        few = held < _FEW
        terms = {
            # Not LIKE, which would treat % and _ in the text as wildcards.
            _WITHIN if few else _WITHIN_UNINDEXED: within if folder else None,
            "number IN (SELECT rowid FROM drawn_words WHERE drawn_words MATCH ?)": (trigrams,) if trigrams else None,
            "instr(words, ?) > 0": (words,) if words else None,
            "model = ?": (query.model,) if query.model else None,
            "caller = ?": (query.caller,) if query.caller is not None else None,
            "digest = ?": (query.digest,) if query.digest else None,
            "number < ?": (query.before,) if query.before is not None else None,
            "+drawn_at >= ?": (time.time() - self._max_age_seconds,) if self._max_age_seconds else None,
        }
        asked = {term: values for term, values in terms.items() if values is not None}
        where = f" WHERE {' AND '.join(asked)}" if asked else ""
        given = [value for values in asked.values() for value in values]
        with self._transaction() as base:
            rows = base.execute(f"{_SHOW}{where} ORDER BY number DESC LIMIT ?", (*given, query.limit))
            return [entry for row in rows if (entry := _parse_entry(row)) is not None]

    def find(self, column: str, value: str) -> HistoryEntry | None:
        """Return the newest entry with this `key` or `digest` (the `column`), or `None`."""
        if column not in ("key", "digest"):
            raise ValueError(f"not a column to find by: {column}")
        with self._transaction() as base:
            row = base.execute(f"{_SHOW} WHERE {column} = ? ORDER BY number DESC LIMIT 1", (value,)).fetchone()
            return _parse_entry(row) if row is not None else None

    def delete(self, key: str) -> None:
        """Delete the entry of a key."""
        with self._transaction() as base:
            base.execute("DELETE FROM drawn WHERE key = ?", (key,))

    def _create_schema(self) -> None:
        with closing(sqlite3.connect(self._path, timeout=_BUSY_SECONDS)) as base:
            base.execute("PRAGMA journal_mode = WAL")
            base.executescript(_TABLE)
            if base.execute(_INDEXED).fetchone() == (0,):
                base.executescript(f"BEGIN IMMEDIATE; {_WORDS} COMMIT;")
            base.execute(f"{_SHOW} LIMIT 1")  # fails if the table has other columns
            (check,) = base.execute("PRAGMA quick_check(1)").fetchone()
            if check != "ok":
                raise sqlite3.DatabaseError(f"its pages are damaged: {check}")

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """Open a connection in a transaction. Raises `StorageUnavailable`."""
        try:
            with closing(sqlite3.connect(f"file:{self._path}?mode=rw", uri=True, timeout=_BUSY_SECONDS)) as base, base:
                base.execute("PRAGMA synchronous = NORMAL")
                yield base
        except sqlite3.Error as error:
            raise _unavailable(error) from error


def _trigrams(words: str) -> str:
    """Return the FTS5 query: all trigrams of the text, at most 24 spread over it; empty below three characters."""
    rows = [words[start : start + 3] for start in range(len(words) - 2)]
    spread = dict.fromkeys(rows[:: -(-len(rows) // _MOST_TRIGRAMS) or 1])
    return " AND ".join('"' + row.replace('"', '""') + '"' for row in spread)


def _to_row(entry: HistoryEntry) -> tuple[object, ...]:
    values = {name: getattr(entry, name) for name in _COLUMNS}
    values["record"] = json.dumps(entry.record, ensure_ascii=False)
    values["seed"] = (entry.seed + _SIGNED) % (
        2 * _SIGNED
    ) - _SIGNED  # the larger half of the seeds as negative numbers
    return (entry.prompt.casefold(), *values.values())


def _parse_entry(row: Sequence[object]) -> HistoryEntry | None:
    """Parse a row; log a damaged row and return `None`."""
    number, *values = row
    columns = dict(zip(_COLUMNS, values, strict=True))
    try:
        record = json.loads(str(columns["record"]))
    except (ValueError, RecursionError):
        record = None
    damaged = [name for name, kind in _KINDS.items() if not isinstance(columns[name], kind)]
    if damaged or not isinstance(record, dict):
        _log.error("an entry of the history is damaged and left out", number=number, columns=damaged or "record")
        return None
    entry = HistoryEntry(**columns, number=int(str(number)))  # type: ignore[arg-type]  # types checked above
    return replace(entry, record=record, seed=entry.seed % (2 * _SIGNED))


def _unavailable(error: Exception) -> StorageUnavailable:
    return StorageUnavailable(f"The history cannot be used ({type(error).__name__}: {error}).", retry_after=30)
