"""The durable record of accepted jobs, in SQLite: what it says is written when a call returns. Used on one thread."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import structlog

from stable_diffusion_server.errors import InFlight, JournalUnavailable
from stable_diffusion_server.journal import tables
from stable_diffusion_server.journal.entries import Claim, Entry, Message, Problem, Repeat, State, Work
from stable_diffusion_server.journal.writing import files_of, read_outcome, read_work, written_order, written_outcome
from stable_diffusion_server.orders import Caller, Receipt

_log = structlog.get_logger(__name__)

_KEPT_FREE = 1_048_576
_ENTRY = "id, caller, prefix, state, accepted_at, attempts, deadline, ended_at, base, webhook_url, outcome"


class Journal:
    """Jobs from acceptance to end, idempotency keys and messages to webhooks. Every call raises `JournalUnavailable`.

    `max_bytes` is how large it may be with all the files of waiting jobs; one job more is refused, and half of it is
    never written.
    """

    def __init__(self, path: Path, max_bytes: int) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._connection: sqlite3.Connection | None = None

    def open(self) -> None:
        """Open the file, or make it; what a process that died had not answered may be asked again."""
        with _told("opened"):
            self._connection = tables.connect(self._path)
        with self._change() as cursor:
            cursor.execute("DELETE FROM claims WHERE job_id IS NULL AND outcome IS NULL")

    def close(self) -> None:
        """Close the file."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def bytes_on_disk(self) -> int:
        """How large the file is, with SQLite's log beside it; any thread may ask."""
        files = (self._path, self._path.with_name(f"{self._path.name}-wal"))
        return sum(file.stat().st_size for file in files if file.exists())

    def accept(self, entry: Entry, work: Work, claim: Claim | None = None) -> Repeat | None:
        """Write a job down with its files, or tell what its key was answered with before, and write nothing.

        Raises `InFlight` when there is a job of that id.
        """
        with self._change(accepting=True) as cursor:
            self._check_disk(sum(map(len, files_of(work).values())))
            if claim is not None and (before := _repeated(cursor, claim)) is not None:
                return before
            cursor.execute(
                "INSERT INTO jobs (id, caller, prefix, state, written, accepted_at, deadline, base, webhook_url) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    *(entry.id, entry.caller.owner, entry.caller.prefix, entry.state, written_order(work.order)),
                    *(entry.accepted_at, entry.deadline, entry.base, entry.webhook_url),
                ),
            )
            rows = [(entry.id, parameter, data) for parameter, data in files_of(work).items()]
            cursor.executemany("INSERT INTO files (job_id, parameter, data) VALUES (?, ?, ?)", rows)
            if claim is not None:
                _insert_claim(cursor, claim, entry.accepted_at, entry.id)
        return None

    def begin(self, job_id: str) -> Work:
        """Count an attempt, and give what is to be drawn."""
        with self._change() as cursor:
            cursor.execute("UPDATE jobs SET attempts = attempts + 1, state = 'running' WHERE id = ?", (job_id,))
            (text,) = cursor.execute("SELECT written FROM jobs WHERE id = ?", (job_id,)).fetchone()
            files = dict(cursor.execute("SELECT parameter, data FROM files WHERE job_id = ?", (job_id,)).fetchall())
        return read_work(text, files)

    def put_back(self, job_id: str, *, forgiven: bool) -> None:
        """Let a job that was begun wait again; `forgiven` attempts do not count."""
        with self._change() as cursor:
            cursor.execute(
                "UPDATE jobs SET state = 'queued', attempts = attempts - ? WHERE id = ?", (int(forgiven), job_id)
            )

    def end(self, entry: Entry, message: str | None = None) -> None:
        """Write down how a job ended, with the message that tells its webhook; its files are of no more use."""
        with self._change() as cursor:
            cursor.execute(
                "UPDATE jobs SET state = ?, ended_at = ?, outcome = ? WHERE id = ?",
                (entry.state, entry.ended_at, written_outcome(entry.outcome), entry.id),
            )
            freed = cursor.execute("DELETE FROM files WHERE job_id = ?", (entry.id,)).rowcount
            if message is not None:
                cursor.execute(
                    "INSERT OR REPLACE INTO messages (job_id, url, body, due) VALUES (?, ?, ?, ?)",
                    (entry.id, entry.webhook_url, message, entry.ended_at),
                )
        if freed:
            self._give_room_back()

    def find(self, job_id: str) -> Entry | None:
        """The job of that id."""
        return next(iter(self._entries("WHERE id = ?", (job_id,))), None)

    def unfinished(self) -> list[Entry]:
        """The jobs that wait or were begun, oldest first."""
        return self._entries("WHERE ended_at IS NULL ORDER BY number", ())

    def latest_of(self, caller: str, most: int) -> list[Entry]:
        """A caller's jobs, newest first."""
        return self._entries("WHERE caller = ? ORDER BY number DESC LIMIT ?", (caller, most))

    def repeated(self, claim: Claim) -> Repeat | None:
        """What a key was answered with before, if it is taken."""
        with self._read() as cursor:
            return _repeated(cursor, claim)

    def claim(self, claim: Claim, now: float) -> Repeat | None:
        """Take a key for a request that waits for its answer, or tell what the key was answered with before."""
        with self._change(accepting=True) as cursor:
            before = _repeated(cursor, claim)
            if before is None:
                _insert_claim(cursor, claim, now, None)
            return before

    def answer(self, claim: Claim, outcome: Receipt | Problem) -> None:
        """Keep what a request with a key was answered with."""
        with self._change() as cursor:
            cursor.execute(
                "UPDATE claims SET outcome = ? WHERE caller = ? AND key = ?",
                (written_outcome(outcome), claim.caller, claim.key),
            )

    def release(self, claim: Claim) -> None:
        """Give a key back that was not answered."""
        with self._change() as cursor:
            cursor.execute("DELETE FROM claims WHERE caller = ? AND key = ?", (claim.caller, claim.key))

    def messages(self, now: float, most: int) -> list[Message]:
        """Messages whose time has come, the longest overdue first."""
        with self._read() as cursor:
            rows = cursor.execute(
                "SELECT job_id, url, body, tries, due FROM messages WHERE due <= ? ORDER BY due LIMIT ?", (now, most)
            )
            return [Message(*row) for row in rows.fetchall()]

    def postpone(self, message: Message, due: float) -> None:
        """Count a failed try, and set the time of the next."""
        with self._change() as cursor:
            cursor.execute("UPDATE messages SET tries = tries + 1, due = ? WHERE job_id = ?", (due, message.job_id))

    def told(self, message: Message) -> None:
        """Forget a message that was taken, or that no one will ever take."""
        with self._change() as cursor:
            cursor.execute("DELETE FROM messages WHERE job_id = ?", (message.job_id,))

    def expire(self, jobs_before: float, claims_before: float) -> None:
        """Forget jobs that ended, and keys that were taken, before those times."""
        with self._change() as cursor:
            cursor.execute("DELETE FROM jobs WHERE ended_at < ?", (jobs_before,))
            cursor.execute(
                "DELETE FROM claims WHERE claimed_at < ? AND (outcome IS NOT NULL OR job_id IS NOT NULL)",
                (claims_before,),
            )
        self._give_room_back()

    def _check_disk(self, size: int) -> None:
        """Raise `JournalUnavailable` where a job would leave the disk no room for the ends of those before it."""
        # Twice: what is written stands in SQLite's log and in its file.
        if shutil.disk_usage(self._path.parent).free < 2 * size + _KEPT_FREE:
            raise JournalUnavailable("Jobs cannot be written down: the disk is full.", retry_after=30)

    def _give_room_back(self) -> None:
        """Let the disk have what is not used any more; where even that needs room that is not there, later."""
        with suppress(JournalUnavailable), self._read() as cursor:
            cursor.executescript("PRAGMA incremental_vacuum")  # a page a step, and execute takes one step alone
            cursor.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def _entries(self, where: str, values: Sequence[object]) -> list[Entry]:
        with self._read() as cursor:
            rows = cursor.execute(f"SELECT {_ENTRY} FROM jobs {where}", values)  # noqa: S608  # texts of this module
            return [_entry_of(row) for row in rows.fetchall()]

    @contextmanager
    def _read(self) -> Iterator[sqlite3.Cursor]:
        if self._connection is None:
            raise JournalUnavailable(
                "Jobs cannot be written down: their journal is not open, and the log says why.", retry_after=30
            )
        with _told("read"):
            yield self._connection.cursor()

    @contextmanager
    def _change(self, *, accepting: bool = False) -> Iterator[sqlite3.Cursor]:
        """A transaction: all of it is on the disk at the end, or nothing."""
        with self._read() as cursor, _told("written"):
            tables.bound(cursor.connection, self._max_bytes, accepting=accepting)
            cursor.execute("BEGIN IMMEDIATE")
            try:
                yield cursor
                cursor.execute("COMMIT")
            except BaseException:
                if cursor.connection.in_transaction:
                    cursor.execute("ROLLBACK")
                raise


@contextmanager
def _told(what: str) -> Iterator[None]:
    """SQLite's errors to ours."""
    try:
        yield
    except sqlite3.IntegrityError as error:
        raise InFlight("There is a job of this id already.", field="X-Job-ID") from error
    except sqlite3.Error as error:
        _log.error("the journal cannot be used", attempted=what, reason=str(error))
        full = getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_FULL
        why = "it is full (JOURNAL_BYTES, or the disk)" if full else f"it could not be {what}"
        raise JournalUnavailable(f"Jobs cannot be written down: {why}.", retry_after=30) from error


def _repeated(cursor: sqlite3.Cursor, claim: Claim) -> Repeat | None:
    row = cursor.execute(
        "SELECT fingerprint, job_id, outcome FROM claims WHERE caller = ? AND key = ?", (claim.caller, claim.key)
    ).fetchone()
    return None if row is None else Repeat(row[0], row[1], read_outcome(row[2]))


def _insert_claim(cursor: sqlite3.Cursor, claim: Claim, now: float, job_id: str | None) -> None:
    cursor.execute(
        "INSERT INTO claims (caller, key, fingerprint, claimed_at, job_id) VALUES (?, ?, ?, ?, ?)",
        (claim.caller, claim.key, claim.fingerprint, now, job_id),
    )


def _entry_of(row: tuple[Any, ...]) -> Entry:
    job_id, caller, prefix, state, accepted_at, attempts, deadline, ended_at, base, webhook_url, outcome = row
    return Entry(
        id=job_id,
        caller=Caller.of_owner(caller, prefix),
        accepted_at=accepted_at,
        state=State(state),
        attempts=attempts,
        deadline=deadline,
        ended_at=ended_at,
        base=base,
        webhook_url=webhook_url,
        outcome=read_outcome(outcome),
    )
