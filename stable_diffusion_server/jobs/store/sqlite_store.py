"""Durable job store in SQLite: a change is on disk when its call returns. Use it on one thread."""

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
from stable_diffusion_server.jobs.store.outbox import OutboxStore, insert_message
from stable_diffusion_server.jobs.store.records import (
    IdempotencyClaim,
    JobPayload,
    JobRecord,
    RecordedResponse,
    StoredProblem,
)
from stable_diffusion_server.jobs.store.serialization import (
    COLUMNS,
    DECODE_ERRORS,
    DamagedRow,
    dump_outcome,
    dump_request,
    load_payload,
    parse_job,
    parse_job_or_failed,
    payload_files,
)
from stable_diffusion_server.types import GenerationResult

_log = structlog.get_logger(__name__)

_MIN_FREE_BYTES = 1_048_576
# Evictions per insert; several may be needed, because the space that a row frees is only estimated.
_MAX_EVICTION_ROUNDS = 8
_SELECT_UNFINISHED = f"SELECT {COLUMNS} FROM jobs WHERE ended_at IS NULL OR state IN ('queued', 'running')"  # noqa: S608  # names of columns

T = TypeVar("T")


class _StoreFull(JobStoreUnavailable):
    """The file or its disk is full."""


class SqliteJobStore(OutboxStore):
    """Stores jobs, idempotency keys and webhook messages. Every call can raise `JobStoreUnavailable`.

    `max_bytes` limits the store, including the files of waiting jobs. When it is full, it evicts ended jobs and
    answered keys, the oldest of the largest share first. If that frees too little, it rejects the new job, and never
    stores a part of it.
    """

    def __init__(self, path: Path, max_bytes: int) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._connection: sqlite3.Connection | None = None

    def open(self) -> None:
        """Open or create the file; release the idempotency keys of requests that a crashed process left unanswered.

        Quarantines a foreign or damaged file and creates a new one. Marks an unfinished job with a damaged row as
        failed.
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
        """Return the size of the file and of SQLite's log in bytes; any thread may call it."""
        files = (self._path, self._path.with_name(f"{self._path.name}-wal"))
        return sum(file.stat().st_size for file in files if file.exists())

    def accept(
        self,
        record: JobRecord,
        payload: JobPayload,
        claim: IdempotencyClaim | None = None,
        message: str | None = None,
    ) -> RecordedResponse | None:
        """Store a job with its files; if its idempotency key has a recorded response, only return that response.

        `message` is the webhook message about its start.

        Raises `RequestInProgress` if a job with that id exists.
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
                "form": record.form,
            }
            cursor.execute(
                f"INSERT INTO jobs ({', '.join(given)}) VALUES ({', '.join('?' * len(given))})",  # noqa: S608  # names of columns
                tuple(given.values()),
            )
            rows = [(record.id, parameter, data) for parameter, data in files.items()]
            cursor.executemany("INSERT INTO files (job_id, parameter, data) VALUES (?, ?, ?)", rows)
            if claim is not None:
                insert_claim(cursor, claim, record.accepted_at, record.id)
            if message is not None:
                insert_message(cursor, record, message, record.accepted_at, "start")
            return None

        return self._insert_with_eviction(size, write)

    def begin_attempt(self, job_id: str) -> JobPayload:
        """Count an attempt and return the job's payload. Raises `ServerError` if it is lost or damaged."""
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
        """Set a started job back to queued; a `forgiven` attempt is subtracted."""
        with self._transaction() as cursor:
            cursor.execute(
                "UPDATE jobs SET state = 'queued', attempts = attempts - ? WHERE id = ?", (int(forgiven), job_id)
            )

    def save_crash_counts(self, record: JobRecord) -> None:
        """Store how often the process crashed or was killed while the job was on the device."""
        with self._transaction() as cursor:
            counted = (record.crashes, record.kills, record.id)
            cursor.execute("UPDATE jobs SET deaths = ?, kills = ? WHERE id = ?", counted)

    def finish(self, record: JobRecord, message: str | None = None) -> None:
        """Store the end of a job and its webhook message, and delete the job's files."""
        with self._transaction() as cursor:
            freed = _write_end(cursor, record)
            if message is not None:
                insert_message(cursor, record, message, record.ended_at or 0.0)
        if freed:
            self._reclaim_disk_space()

    def find(self, job_id: str) -> JobRecord | None:
        """Return the job with that id, or `None`."""
        return next(iter(self._select_jobs("WHERE id = ?", (job_id,))), None)

    def unfinished(self) -> list[JobRecord]:
        """Return the queued and running jobs, oldest first."""
        return self._select_jobs("WHERE ended_at IS NULL ORDER BY number", ())

    def list_recent(self, owner: str | None, most: int) -> list[JobRecord]:
        """Return the latest `most` jobs of an owner, newest first; `None` means all owners."""
        where, given = ("", ()) if owner is None else ("WHERE caller = ? ", (owner,))
        return self._select_jobs(f"{where}ORDER BY number DESC LIMIT ?", (*given, most))

    def recorded_response(self, claim: IdempotencyClaim) -> RecordedResponse | None:
        """Return the recorded response of a claimed key, or `None` for a free key."""
        with self._read() as cursor:
            return find_recorded_response(cursor, claim)

    def claim(self, claim: IdempotencyClaim, now: float) -> RecordedResponse | None:
        """Claim a key for a synchronous request, or return its recorded response. `now`: seconds since the epoch."""

        def write(cursor: sqlite3.Cursor) -> RecordedResponse | None:
            before = find_recorded_response(cursor, claim)
            if before is None:
                insert_claim(cursor, claim, now, None)
            return before

        return self._insert_with_eviction(0, write)

    def record_response(self, claim: IdempotencyClaim, outcome: GenerationResult | StoredProblem) -> None:
        """Store the outcome of a request by its key."""
        with self._transaction() as cursor:
            cursor.execute(
                "UPDATE claims SET outcome = ? WHERE caller = ? AND key = ?",
                (dump_outcome(outcome), claim.caller, claim.key),
            )

    def release_claim(self, claim: IdempotencyClaim) -> None:
        """Release a key without a recorded response."""
        with self._transaction() as cursor:
            cursor.execute("DELETE FROM claims WHERE caller = ? AND key = ?", (claim.caller, claim.key))

    def discard_response(self, claim: IdempotencyClaim, job_id: str | None) -> None:
        """Release a key with a recorded response (that job, or an outcome); keep the key of a request in progress."""
        with self._transaction() as cursor:
            free_claim(cursor, claim, job_id)

    def expire(self, jobs_before: float, claims_before: float) -> None:
        """Delete jobs that ended, and keys claimed, before those times (seconds since the epoch)."""
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
        """Raise `_StoreFull` if a job of `size` bytes leaves no disk space for the ends of earlier jobs."""
        # Twice the size: SQLite writes the data to its log and to its file.
        if shutil.disk_usage(self._path.parent).free < 2 * size + _MIN_FREE_BYTES:
            raise _StoreFull("Jobs cannot be written down: the disk is full.", retry_after=30)

    def _reclaim_disk_space(self) -> None:
        """Return unused pages to the file system; if the disk is too full even for that, a later call retries."""
        with suppress(JobStoreUnavailable), self._read() as cursor:
            cursor.executescript("PRAGMA incremental_vacuum")  # frees one page per step; execute() runs one step
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
        """Run a transaction: at the end all of its changes are on disk, or none."""
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
    """Translate errors of SQLite and the operating system to `ServerError`s; `what` names the attempted action."""
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
    """Store the end of a job and delete its files; return the number of deleted files."""
    cursor.execute(
        "UPDATE jobs SET state = ?1, ended_at = ?2, outcome = ?3, "
        "bytes = length(written) + length(form) + coalesce(length(?3), 0) WHERE id = ?4",
        (record.state, record.ended_at, dump_outcome(record.outcome), record.id),
    )
    return cursor.execute("DELETE FROM files WHERE job_id = ?", (record.id,)).rowcount
