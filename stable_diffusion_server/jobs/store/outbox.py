"""Outbox of webhook messages: selects due messages fairly by caller and host."""

from __future__ import annotations

import sqlite3
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from urllib.parse import urlsplit

from stable_diffusion_server.jobs.store.records import JobRecord, OutboxMessage

# Maximum number of due messages per query: for one receiver of a caller, and for one caller.
_OF_RECEIVER, _OF_CALLER = 16, 256
_DUE = f"""
WITH due AS (
  SELECT m.job_id, m.url, m.body, m.tries, m.due, j.share AS share, m.event AS event,
    row_number() OVER (PARTITION BY j.share, receiver_of(m.url) ORDER BY m.due) AS of_receiver
  FROM messages m JOIN jobs j ON j.id = m.job_id
  WHERE m.due <= ?1 OR m.tries = 0 OR m.due > ?1 + longest_wait(m.tries)
), turns AS (
  SELECT *, row_number() OVER (PARTITION BY share ORDER BY of_receiver, due) AS of_caller
  FROM due WHERE of_receiver <= {_OF_RECEIVER}
)
SELECT job_id, url, body, tries, due, share, event FROM turns WHERE of_caller <= {_OF_CALLER} ORDER BY of_caller
"""  # noqa: S608  # numbers of this module


class OutboxStore(ABC):
    """Base class of the job store: the webhook messages. The subclass provides reads and transactions."""

    @abstractmethod
    def _read(self) -> AbstractContextManager[sqlite3.Cursor]:
        """Return a cursor for reading."""

    @abstractmethod
    def _transaction(self) -> AbstractContextManager[sqlite3.Cursor]:
        """Return a cursor whose changes are committed together, or rolled back on an exception."""

    def due_messages(self, now: float, waits: Sequence[float]) -> list[OutboxMessage]:
        """Return due messages: a limited number per caller, and per receiver of a caller.

        `now` is in seconds since the epoch, `waits` are the seconds between tries. An untried message is due. So is a
        message due later than the longest wait after `now`, because the clock was set back since its last try.
        """

        def longest_wait(tries: int) -> float:
            return waits[min(max(tries - 1, 0), len(waits) - 1)]

        with self._read() as cursor:
            cursor.connection.create_function("receiver_of", 1, webhook_host, deterministic=True)
            cursor.connection.create_function("longest_wait", 1, longest_wait)
            return [OutboxMessage(*row) for row in cursor.execute(_DUE, (now,)).fetchall()]

    def postpone(self, message: OutboxMessage, due: float) -> None:
        """Count a failed try and set the time of the next try; `due`: seconds since the epoch."""
        with self._transaction() as cursor:
            cursor.execute(
                "UPDATE messages SET tries = tries + 1, due = ? WHERE job_id = ? AND event = ?",
                (due, message.job_id, message.event),
            )

    def delete_message(self, message: OutboxMessage) -> None:
        """Delete a message that was delivered or given up."""
        with self._transaction() as cursor:
            cursor.execute("DELETE FROM messages WHERE job_id = ? AND event = ?", (message.job_id, message.event))


def insert_message(cursor: sqlite3.Cursor, record: JobRecord, body: str, due: float, event: str = "") -> None:
    """Insert a message about a job within the caller's transaction. `due`: seconds since the epoch."""
    cursor.execute(
        "INSERT OR REPLACE INTO messages (job_id, event, url, body, due) VALUES (?, ?, ?, ?, ?)",
        (record.id, event, record.webhook_url, body, due),
    )


def webhook_host(url: str) -> str:
    """Return host and port of a webhook URL; the URL itself if it cannot be parsed."""
    try:
        return urlsplit(url).netloc.lower()
    except ValueError:
        return url
