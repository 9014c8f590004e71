"""SQLite schema of the job store: tables, migration, durability settings, size limit, repair."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import structlog

from stable_diffusion_server.files import is_blocked, quarantine

_log = structlog.get_logger(__name__)

_SCHEMA_VERSION = 2
_PAGE = 4096
# For what happens to jobs that were accepted: their ends must find room when no new one does.
_RESERVED_PAGES = 1024
_SCHEMA = """
CREATE TABLE jobs (
  number INTEGER PRIMARY KEY,
  id TEXT NOT NULL UNIQUE,
  caller TEXT NOT NULL,
  prefix TEXT NOT NULL,
  state TEXT NOT NULL,
  written TEXT NOT NULL,
  accepted_at REAL NOT NULL,
  deadline REAL,
  attempts INTEGER NOT NULL DEFAULT 0,
  ended_at REAL,
  base TEXT NOT NULL,
  webhook_url TEXT,
  outcome TEXT,
  share TEXT NOT NULL DEFAULT '',
  bytes INTEGER NOT NULL DEFAULT 0,
  deaths INTEGER NOT NULL DEFAULT 0,
  kills INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX jobs_by_end ON jobs (ended_at);
CREATE INDEX jobs_by_caller ON jobs (caller, number);
CREATE INDEX jobs_by_share ON jobs (share, ended_at, bytes);
CREATE TABLE files (
  job_id TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
  parameter TEXT NOT NULL,
  data BLOB NOT NULL,
  PRIMARY KEY (job_id, parameter)
) WITHOUT ROWID;
CREATE TABLE claims (
  caller TEXT NOT NULL,
  key TEXT NOT NULL,
  fingerprint TEXT NOT NULL,
  claimed_at REAL NOT NULL,
  job_id TEXT REFERENCES jobs (id) ON DELETE CASCADE,
  outcome TEXT,
  share TEXT NOT NULL DEFAULT '',
  PRIMARY KEY (caller, key)
) WITHOUT ROWID;
CREATE INDEX claims_by_job ON claims (job_id);
CREATE INDEX claims_by_share ON claims (share, claimed_at);
CREATE TABLE messages (
  job_id TEXT NOT NULL PRIMARY KEY REFERENCES jobs (id) ON DELETE CASCADE,
  url TEXT NOT NULL,
  body TEXT NOT NULL,
  tries INTEGER NOT NULL DEFAULT 0,
  due REAL NOT NULL
) WITHOUT ROWID;
"""


# What version 1 lacked. A caller without a name had one share, whatever its address.
_FROM_1 = """
ALTER TABLE jobs ADD COLUMN share TEXT NOT NULL DEFAULT '';
ALTER TABLE jobs ADD COLUMN bytes INTEGER NOT NULL DEFAULT 0;
ALTER TABLE jobs ADD COLUMN deaths INTEGER NOT NULL DEFAULT 0;
ALTER TABLE jobs ADD COLUMN kills INTEGER NOT NULL DEFAULT 0;
ALTER TABLE claims ADD COLUMN share TEXT NOT NULL DEFAULT '';
UPDATE jobs SET share = CASE caller WHEN '' THEN 'address ' ELSE 'key ' || caller END,
  bytes = length(written) + coalesce(length(outcome), 0)
  + coalesce((SELECT sum(length(data)) FROM files WHERE job_id = jobs.id), 0);
UPDATE claims SET share = CASE caller WHEN '' THEN 'address ' ELSE 'key ' || caller END;
CREATE INDEX jobs_by_share ON jobs (share, ended_at, bytes);
CREATE INDEX claims_by_share ON claims (share, claimed_at);
"""
# What no call of ours leaves behind: rows that others wrote, or a disk damaged. Each is named in the log and mended,
# or deleted where nothing is left to go by; jobs that have not ended are looked through one by one, see `book`.
_REPAIRS = {
    "DELETE FROM jobs WHERE typeof(id) <> 'text' OR id = ''": "a job without an id",
    "DELETE FROM files WHERE job_id NOT IN (SELECT id FROM jobs)": "a file without a job",
    "DELETE FROM claims WHERE typeof(caller) <> 'text' OR typeof(key) <> 'text' OR typeof(fingerprint) <> 'text' "
    "OR (job_id IS NOT NULL AND job_id NOT IN (SELECT id FROM jobs)) "
    "OR (outcome IS NOT NULL AND (typeof(outcome) <> 'text' OR NOT json_valid(outcome)))": "an idempotency key",
    "UPDATE claims SET claimed_at = 0 WHERE typeof(claimed_at) NOT IN ('real', 'integer')": "the time of a key",
    "DELETE FROM messages WHERE typeof(url) <> 'text' OR typeof(body) <> 'text' OR typeof(job_id) <> 'text' "
    "OR job_id NOT IN (SELECT id FROM jobs)": "a message to a webhook",
    "UPDATE messages SET due = 0, tries = 0 WHERE typeof(due) NOT IN ('real', 'integer') OR typeof(tries) <> 'integer' "
    "OR tries < 0 OR abs(due) > 1e12": "the time of a message",
}


class ForeignSchema(sqlite3.DatabaseError):
    """A database, but not the journal."""


def connect(path: Path) -> sqlite3.Connection:
    """The journal at `path`, made if there is none; what is no journal, or a broken one, is put aside for a new one.

    Raises `sqlite3.Error`, for one that another process uses and for one of a later version too, and `OSError`.
    """
    try:
        return _connect(path)
    except sqlite3.DatabaseError as error:
        if not _is_damage(error) and not is_blocked(path):
            raise
        quarantine(path, str(error))
    return _connect(path)


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=0.5, isolation_level=None)
    try:
        # One process at a time: two would draw the same jobs. The lock ends with the process, however that ends.
        connection.execute("PRAGMA locking_mode = EXCLUSIVE")
        connection.execute(f"PRAGMA page_size = {_PAGE}")
        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")  # a commit is on the disk when it returns
        # Kept short: on a disk that is nearly full a long log would hold the room that ended jobs gave back.
        connection.execute("PRAGMA wal_autocheckpoint = 100")
        connection.execute("PRAGMA journal_size_limit = 1048576")
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("BEGIN IMMEDIATE")
        _migrate(connection)
        connection.execute("COMMIT")
    except sqlite3.Error:
        connection.close()
        raise
    return connection


def _migrate(connection: sqlite3.Connection) -> None:
    """Make the tables, or bring those of an earlier version to this one, within a transaction."""
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    names = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    ours = {"jobs", "files", "claims", "messages"}
    if version > _SCHEMA_VERSION and ours <= names:
        raise sqlite3.DatabaseError(f"the journal is of version {version}, and this server writes {_SCHEMA_VERSION}")
    if not 0 <= version <= _SCHEMA_VERSION or (version == 0 and names) or (version and not ours <= names):
        raise ForeignSchema(f"tables that are not the journal's: {', '.join(sorted(names))[:200]}")
    # An UPDATE that fails on a table of other columns tells so by an error of its own.
    for statement in {0: _SCHEMA, 1: _FROM_1}.get(version, "").split(";"):
        connection.execute(statement)
    connection.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")
    if version:
        _check(connection)


def _check(connection: sqlite3.Connection) -> None:
    """Raise where the tables are not those this version writes, or their pages are damaged; mend what rows can be."""
    with sqlite3.connect(":memory:") as fresh:
        fresh.executescript(_SCHEMA)
        for table in ("jobs", "files", "claims", "messages"):
            if _columns(connection, table) != _columns(fresh, table):
                raise ForeignSchema(f"the table {table} has other columns than the journal's")
    fresh.close()
    if connection.execute("SELECT 1 FROM sqlite_master WHERE type = 'trigger'").fetchone() is not None:
        raise ForeignSchema("there are triggers, which the journal has not")
    (check,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if check != "ok":
        raise ForeignSchema(f"its pages are damaged: {str(check)[:200]}")
    for statement, what in _REPAIRS.items():
        if (rows := connection.execute(statement).rowcount) > 0:
            _log.error("the journal held something damaged, which is mended or left out", what=what, rows=rows)


def _columns(connection: sqlite3.Connection, table: str) -> set[tuple[object, ...]]:
    rows = connection.execute('SELECT name, type, "notnull", pk FROM pragma_table_info(?)', (table,))
    return set(rows.fetchall())


def _is_damage(error: sqlite3.Error) -> bool:
    """Whether an error says that the file is no journal, and not that it is locked, out of reach or out of room."""
    code = getattr(error, "sqlite_errorcode", None)
    broken = (sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_FORMAT)
    return isinstance(error, ForeignSchema) or (code is not None and code & 0xFF in broken)


def limit_size(connection: sqlite3.Connection, max_bytes: int, *, accepting: bool) -> None:
    """Let the file grow to `max_bytes` for what is to be accepted, and a little more for all else."""
    pages = max(1, max_bytes // _PAGE) + (0 if accepting else _RESERVED_PAGES)
    connection.execute(f"PRAGMA max_page_count = {pages}")
