"""The journal's file: its tables, what makes a commit outlive a power cut, and how large it may grow."""

from __future__ import annotations

import sqlite3
from pathlib import Path

_SCHEMA_VERSION = 1
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
  outcome TEXT
);
CREATE INDEX jobs_by_end ON jobs (ended_at);
CREATE INDEX jobs_by_caller ON jobs (caller, number);
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
  PRIMARY KEY (caller, key)
) WITHOUT ROWID;
CREATE INDEX claims_by_job ON claims (job_id);
CREATE TABLE messages (
  job_id TEXT NOT NULL PRIMARY KEY REFERENCES jobs (id) ON DELETE CASCADE,
  url TEXT NOT NULL,
  body TEXT NOT NULL,
  tries INTEGER NOT NULL DEFAULT 0,
  due REAL NOT NULL
) WITHOUT ROWID;
"""


def connect(path: Path) -> sqlite3.Connection:
    """The journal at `path`, made if there is none. Raises `sqlite3.Error`, for one that another process uses too."""
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
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version == 0:
            for statement in _SCHEMA.split(";"):
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")
        elif version != _SCHEMA_VERSION:
            raise sqlite3.DatabaseError(
                f"the journal is of version {version}, and this server writes {_SCHEMA_VERSION}"
            )
        connection.execute("COMMIT")
    except sqlite3.Error:
        connection.close()
        raise
    return connection


def bound(connection: sqlite3.Connection, max_bytes: int, *, accepting: bool) -> None:
    """Let the file grow to `max_bytes` for what is to be accepted, and a little more for all else."""
    pages = max(1, max_bytes // _PAGE) + (0 if accepting else _RESERVED_PAGES)
    connection.execute(f"PRAGMA max_page_count = {pages}")
