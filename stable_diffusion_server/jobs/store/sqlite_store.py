"""Durable job store in SQLite: a change is on disk when its call returns. Used on one thread."""

from __future__ import annotations

import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import structlog

from stable_diffusion_server.errors import JobStoreUnavailable, RequestInProgress, ServerError
from stable_diffusion_server.jobs.store import schema
from stable_diffusion_server.jobs.store.claims import find_recorded_response, free_claim, insert_claim
from stable_diffusion_server.jobs.store.eviction import evict_finished
from stable_diffusion_server.jobs.store.outbox import OutboxStore
from stable_diffusion_server.jobs.store.records import (
    IdempotencyClaim,
    JobPayload,
    JobRecord,
    RecordedResponse,
    StoredProblem,
)
from stable_diffusion_server.jobs.store.rows import COLUMNS, DamagedRow, parse_job, parse_job_or_failed
from stable_diffusion_server.jobs.store.serialization import (
    DECODE_ERRORS,
    dump_outcome,
    dump_request,
    load_payload,
    payload_files,
)
from stable_diffusion_server.types import GenerationResult

_log = structlog.get_logger(__name__)

_MIN_FREE_BYTES = 1_048_576
# What ended is asked to give way so often for one job, since how much a row frees is known roughly.
_MAX_EVICTION_ROUNDS = 8
_SELECT_UNFINISHED = f"SELECT {COLUMNS} FROM jobs WHERE ended_at IS NULL OR state IN ('queued', 'running')"  # noqa: S608  # names of columns

T = TypeVar("T")


class _StoreFull(JobStoreUnavailable):
    """The file or its disk is full."""


class SqliteJobStore(OutboxStore):
    """Jobs from acceptance to end, idempotency keys and messages to webhooks. Every call raises `JobStoreUnavailable`.

    `max_bytes` is how large it may be with all the files of waiting jobs. When it is full, jobs that ended and keys
    that were answered give way, the oldest of whoever holds the most; one job more is refused then, and half of it is
    never written.
    """

    def __init__(self, path: Path, max_bytes: int) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._connection: sqlite3.Connection | None = None

    def open(self) -> None:
        """Open the file, or make it; what a process that died had not answered may be asked again.

        A file that is no journal, or a broken one, is put aside for a new one. A job whose row is damaged is failed.
        """
        with _translate_sqlite_errors("opened"):
            self._connection = schema.connect(self._path)
        with self._transaction() as cursor:
            cursor.execute("DELETE FROM claims WHERE job_id IS NULL AND outcome IS NULL")
            now = time.time()
            for row in cursor.execute(_SELECT_UNFINISHED).fetchall():
                try:
                    parse_job(row)
                except DamagedRow:
                    _write_end(cursor, parse_job_or_failed(row, now))

    def close(self) -> None:
        """Close the file."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def bytes_on_disk(self) -> int:
        """How large the file is, with SQLite's log beside it; any thread may ask."""
        files = (self._path, self._path.with_name(f"{self._path.name}-wal"))
        return sum(file.stat().st_size for file in files if file.exists())

    def accept(
        self, record: JobRecord, payload: JobPayload, claim: IdempotencyClaim | None = None
    ) -> RecordedResponse | None:
        """Write a job down with its files, or tell what its key was answered with before, and write nothing.

        Raises `RequestInProgress` when there is a job of that id.
        """
        files = payload_files(payload)
        size = record.bytes or sum(map(len, files.values()))

        def write(cursor: sqlite3.Cursor) -> RecordedResponse | None:
            self._check_disk(size)
            if claim is not None and (before := find_recorded_response(cursor, claim)) is not None:
                return before
            given = {
                "id": record.id,
                "caller": record.caller.owner,
                "prefix": record.caller.prefix,
                "state": record.state,
                "written": dump_request(payload.request),
                "accepted_at": record.accepted_at,
                "deadline": record.deadline,
                "base": record.base_url,
                "webhook_url": record.webhook_url,
                "share": record.share,
                "bytes": record.bytes,
            }
            cursor.execute(
                f"INSERT INTO jobs ({', '.join(given)}) VALUES ({', '.join('?' * len(given))})",  # noqa: S608  # names of columns
                tuple(given.values()),
            )
            rows = [(record.id, parameter, data) for parameter, data in files.items()]
            cursor.executemany("INSERT INTO files (job_id, parameter, data) VALUES (?, ?, ?)", rows)
            if claim is not None:
                insert_claim(cursor, claim, record.accepted_at, record.id)
            return None

        return self._insert_with_eviction(size, write)

    def begin_attempt(self, job_id: str) -> JobPayload:
        """Count an attempt, and give what is to be drawn."""
        with self._transaction() as cursor:
            cursor.execute("UPDATE jobs SET attempts = attempts + 1, state = 'running' WHERE id = ?", (job_id,))
            row = cursor.execute("SELECT written FROM jobs WHERE id = ?", (job_id,)).fetchone()
            if row is None:
                raise ServerError("What was written down of this job is lost; ask again.")
            files = dict(cursor.execute("SELECT parameter, data FROM files WHERE job_id = ?", (job_id,)).fetchall())
        try:
            return load_payload(row[0], files)
        except DECODE_ERRORS as error:
            raise ServerError("What was written down of this job is damaged; ask again.") from error

    def requeue(self, job_id: str, *, forgiven: bool) -> None:
        """Let a job that was begun wait again; `forgiven` attempts do not count."""
        with self._transaction() as cursor:
            cursor.execute(
                "UPDATE jobs SET state = 'queued', attempts = attempts - ? WHERE id = ?", (int(forgiven), job_id)
            )

    def save_crash_counts(self, record: JobRecord) -> None:
        """Write down how often the process has died while a job was on the device, and why."""
        with self._transaction() as cursor:
            counted = (record.crashes, record.kills, record.id)
            cursor.execute("UPDATE jobs SET deaths = ?, kills = ? WHERE id = ?", counted)

    def finish(self, record: JobRecord, message: str | None = None) -> None:
        """Write down how a job ended, with the message that tells its webhook; its files are of no more use."""
        with self._transaction() as cursor:
            freed = _write_end(cursor, record)
            if message is not None:
                cursor.execute(
                    "INSERT OR REPLACE INTO messages (job_id, url, body, due) VALUES (?, ?, ?, ?)",
                    (record.id, record.webhook_url, message, record.ended_at),
                )
        if freed:
            self._reclaim_disk_space()

    def find(self, job_id: str) -> JobRecord | None:
        """The job of that id."""
        return next(iter(self._select_jobs("WHERE id = ?", (job_id,))), None)

    def unfinished(self) -> list[JobRecord]:
        """The jobs that wait or were begun, oldest first."""
        return self._select_jobs("WHERE ended_at IS NULL ORDER BY number", ())

    def list_recent(self, owner: str | None, most: int) -> list[JobRecord]:
        """The jobs of an owner, newest first; `None`: of all."""
        where, given = ("", ()) if owner is None else ("WHERE caller = ? ", (owner,))
        return self._select_jobs(f"{where}ORDER BY number DESC LIMIT ?", (*given, most))

    def recorded_response(self, claim: IdempotencyClaim) -> RecordedResponse | None:
        """What a key was answered with before, if it is taken."""
        with self._read() as cursor:
            return find_recorded_response(cursor, claim)

    def claim(self, claim: IdempotencyClaim, now: float) -> RecordedResponse | None:
        """Take a key for a request that waits for its answer, or tell what the key was answered with before."""

        def write(cursor: sqlite3.Cursor) -> RecordedResponse | None:
            before = find_recorded_response(cursor, claim)
            if before is None:
                insert_claim(cursor, claim, now, None)
            return before

        return self._insert_with_eviction(0, write)

    def record_response(self, claim: IdempotencyClaim, outcome: GenerationResult | StoredProblem) -> None:
        """Keep what a request with a key was answered with."""
        with self._transaction() as cursor:
            cursor.execute(
                "UPDATE claims SET outcome = ? WHERE caller = ? AND key = ?",
                (dump_outcome(outcome), claim.caller, claim.key),
            )

    def release_claim(self, claim: IdempotencyClaim) -> None:
        """Give a key back that was not answered."""
        with self._transaction() as cursor:
            cursor.execute("DELETE FROM claims WHERE caller = ? AND key = ?", (claim.caller, claim.key))

    def discard_response(self, claim: IdempotencyClaim, job_id: str | None) -> None:
        """Give a key back that was answered, by that job or by an outcome; not one that is being answered."""
        with self._transaction() as cursor:
            free_claim(cursor, claim, job_id)

    def expire(self, jobs_before: float, claims_before: float) -> None:
        """Forget jobs that ended, and keys that were taken, before those times."""
        with self._transaction() as cursor:
            cursor.execute("DELETE FROM jobs WHERE ended_at < ?", (jobs_before,))
            cursor.execute(
                "DELETE FROM claims WHERE claimed_at < ? AND (outcome IS NOT NULL OR job_id IS NOT NULL)",
                (claims_before,),
            )
        self._reclaim_disk_space()

    def _insert_with_eviction(self, size: int, write: Callable[[sqlite3.Cursor], T]) -> T:
        """Insert rows; if the store is full, evict ended jobs and retry."""
        for _ in range(_MAX_EVICTION_ROUNDS):
            try:
                with self._transaction(accepting=True) as cursor:
                    return write(cursor)
            except _StoreFull:
                with self._transaction() as cursor:
                    rows = evict_finished(cursor, size, self._max_bytes)
                if not rows:
                    break
                _log.warning("the journal is full; the oldest that ended gives way", rows=rows)
                self._reclaim_disk_space()
        with self._transaction(accepting=True) as cursor:
            return write(cursor)

    def _check_disk(self, size: int) -> None:
        """Raise `_StoreFull` where a job would leave the disk no room for the ends of those before it."""
        # Twice: what is written stands in SQLite's log and in its file.
        if shutil.disk_usage(self._path.parent).free < 2 * size + _MIN_FREE_BYTES:
            raise _StoreFull("Jobs cannot be written down: the disk is full.", retry_after=30)

    def _reclaim_disk_space(self) -> None:
        """Let the disk have what is not used any more; where even that needs room that is not there, later."""
        with suppress(JobStoreUnavailable), self._read() as cursor:
            cursor.executescript("PRAGMA incremental_vacuum")  # a page a step, and execute takes one step alone
            cursor.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def _select_jobs(self, where: str, values: Sequence[object]) -> list[JobRecord]:
        with self._read() as cursor:
            rows = cursor.execute(f"SELECT {COLUMNS} FROM jobs {where}", values)  # noqa: S608  # texts of this module
            return [parse_job_or_failed(row, time.time()) for row in rows.fetchall()]

    @contextmanager
    def _read(self) -> Iterator[sqlite3.Cursor]:
        if self._connection is None:
            raise JobStoreUnavailable(
                "Jobs cannot be written down: their journal is not open, and the log says why.", retry_after=30
            )
        with _translate_sqlite_errors("read"):
            yield self._connection.cursor()

    @contextmanager
    def _transaction(self, *, accepting: bool = False) -> Iterator[sqlite3.Cursor]:
        """A transaction: all of it is on the disk at the end, or nothing."""
        with self._read() as cursor, _translate_sqlite_errors("written"):
            schema.limit_size(cursor.connection, self._max_bytes, accepting=accepting)
            cursor.execute("BEGIN IMMEDIATE")
            try:
                yield cursor
                cursor.execute("COMMIT")
            except BaseException:
                if cursor.connection.in_transaction:
                    cursor.execute("ROLLBACK")
                raise


@contextmanager
def _translate_sqlite_errors(what: str) -> Iterator[None]:
    """SQLite's errors to ours."""
    try:
        yield
    except sqlite3.IntegrityError as error:
        raise RequestInProgress("There is a job of this id already.", field="X-Job-ID") from error
    except sqlite3.Error as error:
        full = getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_FULL
        if not full:
            _log.error("the journal cannot be used", attempted=what, reason=str(error))
        why = "it is full (JOB_STORE_BYTES, or the disk)" if full else f"it could not be {what}"
        raise (_StoreFull if full else JobStoreUnavailable)(
            f"Jobs cannot be written down: {why}.", retry_after=30
        ) from error
    except OSError as error:
        _log.error("the journal cannot be used", attempted=what, reason=str(error))
        raise JobStoreUnavailable(f"Jobs cannot be written down: {error.strerror}.", retry_after=30) from error


def _write_end(cursor: sqlite3.Cursor, record: JobRecord) -> int:
    """Write down how a job ended; how many files it had, which are of no more use."""
    cursor.execute(
        "UPDATE jobs SET state = ?1, ended_at = ?2, outcome = ?3, bytes = length(written) + coalesce(length(?3), 0) "
        "WHERE id = ?4",
        (record.state, record.ended_at, dump_outcome(record.outcome), record.id),
    )
    return cursor.execute("DELETE FROM files WHERE job_id = ?", (record.id,)).rowcount
