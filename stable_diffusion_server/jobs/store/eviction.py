"""Evicts ended jobs and answered idempotency keys from a full store, oldest first, from the largest share."""

from __future__ import annotations

import sqlite3
from collections import Counter

from stable_diffusion_server.concurrency import largest_holder

# Each eviction frees at least 1/32 of the store, so that a full store is not searched again for every new job.
_PART = 32
# Approximate bytes of a row besides its texts, including its index entries.
_ROW = 400
_ROWS_AT_A_TIME = 64
_HELD_BY_JOBS = f"SELECT share, sum(bytes + {_ROW}) FROM jobs WHERE ended_at IS NOT NULL GROUP BY share"  # noqa: S608  # a number of this module
_HELD_BY_KEYS = (
    f"SELECT share, sum({_ROW} + coalesce(length(outcome), 0)) FROM claims "  # noqa: S608  # a number of this module
    "WHERE job_id IS NULL AND outcome IS NOT NULL GROUP BY share"
)
# Jobs with an undelivered webhook message are evicted last, but evicted: a silent receiver would hold them for a day.
_OLDEST_JOBS = (
    f"SELECT id IN (SELECT job_id FROM messages), ended_at, bytes + {_ROW}, id, '' FROM jobs "  # noqa: S608  # a number of this module
    "WHERE share = ? AND ended_at IS NOT NULL ORDER BY 1, 2 LIMIT ?"
)
_OLDEST_KEYS = (
    f"SELECT 0, claimed_at, {_ROW} + length(outcome), caller, key FROM claims "  # noqa: S608  # a number of this module
    "WHERE share = ? AND job_id IS NULL AND outcome IS NOT NULL ORDER BY 2 LIMIT ?"
)


def evict_finished(cursor: sqlite3.Cursor, wanted: int, max_bytes: int) -> int:
    """Delete ended jobs and answered keys of the largest shares until about `wanted` bytes are free.

    Returns the number of deleted rows. Keeps unfinished jobs with their keys, and the keys of requests in progress.
    """
    held: Counter[str] = Counter()
    for query in (_HELD_BY_JOBS, _HELD_BY_KEYS):
        held.update(dict(cursor.execute(query).fetchall()))
    left, rows = max(wanted + _ROW, max_bytes // _PART), 0
    while left > 0 and held:
        share = largest_holder(held)
        freed, gone = _delete_oldest(cursor, share, left)
        held[share], left, rows = held[share] - freed, left - freed, rows + gone
        if not gone:
            del held[share]
    return rows


def _delete_oldest(cursor: sqlite3.Cursor, share: str, wanted: int) -> tuple[int, int]:
    """Delete the oldest rows of a share until `wanted` bytes are free; return freed bytes and deleted rows."""
    found = [
        row
        for query in (_OLDEST_JOBS, _OLDEST_KEYS)
        for row in cursor.execute(query, (share, _ROWS_AT_A_TIME)).fetchall()
    ]
    freed, gone = 0, 0
    for _, _, size, name, key in sorted(found)[:_ROWS_AT_A_TIME]:
        if freed >= wanted:
            break
        if key:
            cursor.execute("DELETE FROM claims WHERE caller = ? AND key = ?", (name, key))
        else:
            cursor.execute("DELETE FROM jobs WHERE id = ?", (name,))
        freed, gone = freed + size, gone + 1
    return freed, gone
