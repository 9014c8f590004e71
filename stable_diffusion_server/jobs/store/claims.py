"""Runs the SQL for idempotency keys, within the caller's transaction."""

from __future__ import annotations

import sqlite3

from stable_diffusion_server.jobs.store.records import IdempotencyClaim, RecordedResponse
from stable_diffusion_server.jobs.store.serialization import parse_recorded_response


def find_recorded_response(cursor: sqlite3.Cursor, claim: IdempotencyClaim) -> RecordedResponse | None:
    """Return the recorded response of a claimed key, or `None` for a free key; delete a damaged claim."""
    row = cursor.execute(
        "SELECT fingerprint, job_id, outcome FROM claims WHERE caller = ? AND key = ?", (claim.caller, claim.key)
    ).fetchone()
    if row is None or (repeat := parse_recorded_response(row)) is not None:
        return repeat if row is not None else None
    cursor.execute("DELETE FROM claims WHERE caller = ? AND key = ?", (claim.caller, claim.key))
    return None


def insert_claim(cursor: sqlite3.Cursor, claim: IdempotencyClaim, now: float, job_id: str | None) -> None:
    """Claim a key for a job, or with `job_id=None` for a synchronous request. `now`: seconds since the epoch."""
    cursor.execute(
        "INSERT INTO claims (caller, key, fingerprint, claimed_at, job_id, share) VALUES (?, ?, ?, ?, ?, ?)",
        (claim.caller, claim.key, claim.fingerprint, now, job_id, claim.share),
    )


def free_claim(cursor: sqlite3.Cursor, claim: IdempotencyClaim, job_id: str | None) -> None:
    """Release a key with a recorded response (that job, or an outcome); keep the key of a request in progress."""
    cursor.execute(
        "DELETE FROM claims WHERE caller = ? AND key = ? AND job_id IS ? "
        "AND (job_id IS NOT NULL OR outcome IS NOT NULL)",
        (claim.caller, claim.key, job_id),
    )
