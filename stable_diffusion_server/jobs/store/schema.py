"""SQLite schema of the job store: tables, migration, durability settings, size limit, repair."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import structlog

from stable_diffusion_server.files import is_blocked, quarantine

_log = structlog.get_logger(__name__)

_SCHEMA_VERSION = 3
_PAGE = 4096
# Reserved for accepted jobs: storing their ends must succeed even when the store has no space for new jobs.
_RESERVED_PAGES = 1024
_JOBS = """
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
  kills INTEGER NOT NULL DEFAULT 0,
  form TEXT NOT NULL DEFAULT ''
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
"""
_MESSAGES = """
CREATE TABLE messages (
  job_id TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
  event TEXT NOT NULL DEFAULT '',
  url TEXT NOT NULL,
  body TEXT NOT NULL,
  tries INTEGER NOT NULL DEFAULT 0,
  due REAL NOT NULL,
  PRIMARY KEY (job_id, event)
) WITHOUT ROWID;
"""
_SCHEMA = f"{_JOBS}{_MESSAGES}"


# Migration from version 1, in which all anonymous callers had one share, regardless of their address.
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
# Migration from version 2, in which a job had one message, and no form of a dialect.
_FROM_2 = f"""
ALTER TABLE jobs ADD COLUMN form TEXT NOT NULL DEFAULT '';
ALTER TABLE messages RENAME TO earlier_messages;
{_MESSAGES}
INSERT INTO messages (job_id, url, body, tries, due) SELECT job_id, url, body, tries, due FROM earlier_messages;
DROP TABLE earlier_messages;
"""  # noqa: S608  # texts of this module
# Repairs of rows that other programs wrote or a disk damaged. Each repair is logged; a row that cannot be repaired is
# deleted. `SqliteJobStore.open` checks unfinished jobs one by one.
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
    """The file is a database, but not a valid job store."""


def connect(path: Path) -> sqlite3.Connection:
    """Open the job store at `path`, or create it; quarantine a foreign or damaged file and create a new store.

    Raises `OSError` and `sqlite3.Error`, also if another process uses the store or a later version wrote it.
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
        # Only one process may open it: two would run the same jobs. The lock ends with the process, even after a crash.
        connection.execute("PRAGMA locking_mode = EXCLUSIVE")
        connection.execute(f"PRAGMA page_size = {_PAGE}")
        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")  # COMMIT returns after the data is on disk
        # Keep the log short: on a nearly full disk, a long log would hold the space that ended jobs released.
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
    """Create the tables, or migrate the tables of an earlier version; runs within the caller's transaction."""
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    names = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    ours = {"jobs", "files", "claims", "messages"}
    if version > _SCHEMA_VERSION and ours <= names:
        raise sqlite3.DatabaseError(f"the journal is of version {version}, and this server writes {_SCHEMA_VERSION}")
    if not 0 <= version <= _SCHEMA_VERSION or (version == 0 and names) or (version and not ours <= names):
        raise ForeignSchema(f"tables that are not the journal's: {', '.join(sorted(names))[:200]}")
    # If the columns differ, the UPDATE raises an error of its own.
    for statement in {0: _SCHEMA, 1: f"{_FROM_1};{_FROM_2}", 2: _FROM_2}.get(version, "").split(";"):
        connection.execute(statement)
    connection.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")
    if version:
        _check(connection)


def _check(connection: sqlite3.Connection) -> None:
    """Raise `ForeignSchema` if the tables differ from this version or pages are damaged; repair damaged rows."""
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
    """Return whether an error means a foreign or damaged file, not a locked, unreachable or full one."""
    code = getattr(error, "sqlite_errorcode", None)
    broken = (sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_FORMAT)
    return isinstance(error, ForeignSchema) or (code is not None and code & 0xFF in broken)


def limit_size(connection: sqlite3.Connection, max_bytes: int, *, accepting: bool) -> None:
    """Limit the file to `max_bytes` for new jobs, and to 1,024 pages (4 MiB) more for all other changes."""
    pages = max(1, max_bytes // _PAGE) + (0 if accepting else _RESERVED_PAGES)
    connection.execute(f"PRAGMA max_page_count = {pages}")
