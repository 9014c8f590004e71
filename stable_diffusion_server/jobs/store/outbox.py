"""Outbox of webhook messages: which are due, with fair shares per caller and host."""

from __future__ import annotations

import sqlite3
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from urllib.parse import urlsplit

from stable_diffusion_server.jobs.store.records import OutboxMessage

# As many are given out at a time: of one receiver of a caller, and of one caller.
_OF_RECEIVER, _OF_CALLER = 16, 256
_DUE = f"""
WITH due AS (
  SELECT m.job_id, m.url, m.body, m.tries, m.due, j.share AS share,
    row_number() OVER (PARTITION BY j.share, receiver_of(m.url) ORDER BY m.due) AS of_receiver
  FROM messages m JOIN jobs j ON j.id = m.job_id
  WHERE m.due <= ?1 OR m.tries = 0 OR m.due > ?1 + longest_wait(m.tries)
), turns AS (
  SELECT *, row_number() OVER (PARTITION BY share ORDER BY of_receiver, due) AS of_caller
  FROM due WHERE of_receiver <= {_OF_RECEIVER}
)
SELECT job_id, url, body, tries, due, share FROM turns WHERE of_caller <= {_OF_CALLER} ORDER BY of_caller
"""  # noqa: S608  # numbers of this module


class OutboxStore(ABC):
    """The part of the journal that holds messages; the rest of it reads and changes the file."""

    @abstractmethod
    def _read(self) -> AbstractContextManager[sqlite3.Cursor]:
        """A cursor to read with."""

    @abstractmethod
    def _transaction(self) -> AbstractContextManager[sqlite3.Cursor]:
        """A cursor whose changes are kept together, or not at all."""

    def due_messages(self, now: float, waits: Sequence[float]) -> list[OutboxMessage]:
        """Messages whose time has come, some of each caller, of whom each receiver's some.

        `waits` are the seconds between tries. One that was never tried is due, and so is one whose time lies further
        ahead than any try sets it: the clock was set back since.
        """

        def longest_wait(tries: int) -> float:
            return waits[min(max(tries - 1, 0), len(waits) - 1)]

        with self._read() as cursor:
            cursor.connection.create_function("receiver_of", 1, webhook_host, deterministic=True)
            cursor.connection.create_function("longest_wait", 1, longest_wait)
            return [OutboxMessage(*row) for row in cursor.execute(_DUE, (now,)).fetchall()]

    def postpone(self, message: OutboxMessage, due: float) -> None:
        """Count a failed try, and set the time of the next."""
        with self._transaction() as cursor:
            cursor.execute("UPDATE messages SET tries = tries + 1, due = ? WHERE job_id = ?", (due, message.job_id))

    def delete_message(self, message: OutboxMessage) -> None:
        """Forget a message that was taken, or that no one will ever take."""
        with self._transaction() as cursor:
            cursor.execute("DELETE FROM messages WHERE job_id = ?", (message.job_id,))


def webhook_host(url: str) -> str:
    """The host and port a message goes to."""
    try:
        return urlsplit(url).netloc.lower()
    except ValueError:
        return url
