"""Damaged files in DATA_DIR are quarantined or repaired and logged; the server starts and generates with the rest."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import RunningApp
from fakes import until
from job_records import CLAIM, ENTRY, RECEIPT, WORK

from stable_diffusion_server.errors import JobStoreUnavailable
from stable_diffusion_server.jobs.store.records import JobPayload, JobRecord, JobState
from stable_diffusion_server.jobs.store.schema import connect
from stable_diffusion_server.jobs.store.sqlite_store import SqliteJobStore
from stable_diffusion_server.storage.history.entries import HistoryEntry as Drawn
from stable_diffusion_server.storage.history.entries import HistoryQuery
from stable_diffusion_server.storage.history.index import HistoryIndex
from stable_diffusion_server.types import Caller, GenerationRequest, Task

pytestmark = pytest.mark.slow

SIGNED = {"signed_url_seconds": 600}
ASK = {"prompt": "a red square", "num_inference_steps": 2}
# Values that other programs may write into a column; the table decides whether it accepts them.
VALUES: tuple[object, ...] = (
    None,
    "",
    "quexed",
    "{",
    "[]",
    "null",
    '{"version": 1}',
    -1,
    2**62,
    9e999,
    -9e999,
    b"\xff\x00",
    "9" * 5000,
    "[" * 9000,
)
MOST = 10_000_000


def waiting(name: str) -> tuple[JobRecord, JobPayload]:
    order = GenerationRequest(Task.TEXT_TO_IMAGE, f"a red square {name}", num_inference_steps=2, width=64, height=64)
    return JobRecord(name, Caller(), time.time(), share="address 127.0.0.1"), JobPayload(order)


def kept(path: Path) -> SqliteJobStore:
    """A closed job store with jobs in every state, keys, messages and files."""
    journal = SqliteJobStore(path, MOST)
    journal.open()
    for name in ("whole-1", "damaged", "whole-2"):
        journal.accept(*waiting(name))
    ended = JobRecord("ended", Caller("ann", "ann/"), 1000.0, JobState.DONE, ended_at=time.time(), outcome=RECEIPT)
    journal.accept(JobRecord("ended", Caller("ann", "ann/"), 1000.0, webhook_url="https://hook.example/"), WORK, CLAIM)
    journal.finish(JobRecord(**{**_fields(ended), "webhook_url": "https://hook.example/"}), "the body")
    journal.accept(ENTRY, WORK)
    journal.claim(CLAIM.__class__("ann", "key-2", "print-2"), 1.0)
    journal.record_response(CLAIM.__class__("ann", "key-2", "print-2"), RECEIPT)
    journal.close()
    return journal


def _fields(entry: JobRecord) -> dict[str, Any]:
    return {name: getattr(entry, name) for name in JobRecord.__slots__}


def columns() -> list[tuple[str, str]]:
    """Every column of every table of the job store."""
    with closing(connect(Path(":memory:"))) as base_url:
        tables = [name for (name,) in base_url.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        return [
            (table, column)
            for table in tables
            for (column,) in base_url.execute("SELECT name FROM pragma_table_info(?)", (table,)).fetchall()
        ]


def test_every_column_is_among_those_that_are_damaged() -> None:
    """All tables, including those that later versions add."""
    assert {table for table, _ in columns()} == {"jobs", "files", "claims", "messages"}
    assert len(columns()) >= 30


@pytest.mark.fault(152)
@pytest.mark.parametrize(("table", "column"), columns())
def test_a_damaged_row_holds_up_no_other(tmp_path: Path, table: str, column: str) -> None:
    """Any value in any column: the store opens, whole jobs run, and the damaged one is reported or fails."""
    kept(tmp_path / "whole.db")
    for number, value in enumerate(VALUES):
        path = tmp_path / f"{number}.db"
        shutil.copyfile(tmp_path / "whole.db", path)
        journal = SqliteJobStore(path, MOST)
        where = {"jobs": "id = 'damaged'", "files": "1", "claims": "1", "messages": "1"}[table]
        with closing(sqlite3.connect(path)) as base_url, base_url:
            base_url.execute("PRAGMA foreign_keys = OFF")
            try:
                base_url.execute(f"UPDATE {table} SET {column} = ? WHERE {where}", (value,))  # noqa: S608  # of the schema
            except sqlite3.Error:
                continue  # the table rejects this value
        journal.open()
        unfinished = [entry.id for entry in journal.unfinished()]
        assert {"whole-1", "whole-2"} <= set(unfinished), (column, value)
        for name in ("whole-1", "whole-2"):
            assert journal.begin_attempt(name).request.prompt == f"a red square {name}"
        for caller in ("", "ann"):
            assert all(isinstance(entry.state, JobState) for entry in journal.list_recent(caller, 99))
        for name in ("damaged", "ended"):
            reported = journal.find(name)
            assert reported is None or isinstance(reported.accepted_at, int | float)
        for key in ("key-1", "key-2", "key-3"):
            journal.claim(CLAIM.__class__("ann", key, "print"), 5.0)
        for message in journal.due_messages(time.time(), 9):
            assert isinstance(message.body, str)
            journal.postpone(message, 9.0)
        journal.expire(1.0, 1.0)
        journal.accept(*waiting("later"))
        journal.close()


@pytest.mark.fault(152)
@pytest.mark.parametrize(
    "change",
    [
        "state = 'quexed'",
        "deadline = 'soon'",
        "written = '{'",
        "attempts = 'x'",
        "accepted_at = 'x'",
        "caller = x'ff'",
        "ended_at = 5",
    ],
)
def test_a_server_draws_what_is_whole_beside_a_damaged_job(
    run_app: Callable[..., RunningApp], tmp_path: Path, change: str
) -> None:
    """The whole ones are done; the damaged one has failed, and says so."""
    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / "journal.db"
    kept(path)
    with closing(sqlite3.connect(path)) as base_url, base_url:
        base_url.execute(f"UPDATE jobs SET {change} WHERE id = 'damaged'")  # noqa: S608  # written above
    running_app = run_app()
    for name in ("whole-1", "whole-2"):
        until(lambda name=name: running_app.client.get(f"/jobs/{name}").json()["state"] == "done")
    if not change.startswith("caller"):
        until(lambda: running_app.client.get("/jobs/damaged").json()["state"] == "failed")
        assert "damaged" in running_app.client.get("/jobs/damaged").json()["problem"]["detail"]
    assert running_app.client.get("/jobs").status_code == 200


FILES = (
    "journal.db",
    "journal.db-wal",
    "history.db",
    "history.db-wal",
    "progress.txt",
    "url-secret",
    "device.json",
    "death.json",
    "crash.log",
)


def damaged(path: Path, how: str) -> None:
    """Put something else in the place of a file."""
    match how:
        case "garbage":
            path.write_bytes(os.urandom(5000))
        case "empty":
            path.write_bytes(b"")
        case "folder":
            path.mkdir()
            (path / "inside").touch()
        case "cut":
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if path.exists() else b"SQLite format 3\x00")
        case "another program's":
            with closing(sqlite3.connect(path)) as base_url, base_url:
                base_url.execute("CREATE TABLE jobs (a, b)")
                base_url.execute("CREATE TABLE drawn (a, b)")
        case "a link to nothing":
            path.symlink_to(path.parent / "nowhere")


@pytest.mark.fault(153)
@pytest.mark.parametrize("how", ["garbage", "empty", "folder", "cut", "another program's", "a link to nothing"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_holds_up_nothing(
    run_app: Callable[..., RunningApp], tmp_path: Path, name: str, how: str
) -> None:
    """For damage to any file: the server is ready; an image, its signed URL, a job and the history work."""
    data = tmp_path / "data"
    data.mkdir()
    damaged(data / name, how)
    running_app = run_app(**SIGNED)
    assert running_app.client.get("/readyz").json()["missing"] == []
    receipt = running_app.client.get("/create_and_upload_image", params={**ASK, "seed": 5}).json()
    assert httpx.URL(receipt["path"]).params["signature"]
    assert running_app.client.get(receipt["path"]).status_code == 200
    accepted = running_app.client.post("/create_and_upload_image", json=ASK, headers={"Prefer": "respond-async"})
    assert accepted.status_code == 202, accepted.text
    until(lambda: running_app.client.get(accepted.headers["location"]).json()["state"] == "done")
    assert running_app.client.get("/history").status_code == 200
    until(lambda: len(running_app.client.get("/history").json()["pictures"]) >= 1)


@pytest.mark.fault(153)
@pytest.mark.parametrize("name", ["journal.db", "history.db"])
def test_what_is_quarantined_is_kept_whole(run_app: Callable[..., RunningApp], tmp_path: Path, name: str) -> None:
    """Under a descriptive name, with its write-ahead log beside it; the new file starts empty."""
    (tmp_path / "data").mkdir()
    noise = os.urandom(5000)
    (tmp_path / "data" / name).write_bytes(noise)
    run_app()
    until(lambda: bool(list((tmp_path / "data").glob(f"{name}.broken-*"))))
    (elsewhere,) = (tmp_path / "data").glob(f"{name}.broken-*")
    assert elsewhere.read_bytes() == noise


@pytest.mark.fault(153)
@pytest.mark.parametrize("part", [0.2, 0.5, 0.9])
def test_a_journal_whose_pages_are_damaged_is_quarantined(tmp_path: Path, part: float) -> None:
    """Not only its header: noise in the middle, which a query of one row would not find."""
    journal = SqliteJobStore(tmp_path / "journal.db", MOST)
    journal.open()
    for number in range(300):
        journal.accept(*waiting(f"job-{number}"))
    journal.close()
    content = bytearray((tmp_path / "journal.db").read_bytes())
    at = int(len(content) * part) // 4096 * 4096
    content[at : at + 12_288] = os.urandom(12_288)
    (tmp_path / "journal.db").write_bytes(content)
    journal.open()
    assert journal.unfinished() == []
    journal.accept(*waiting("later"))
    journal.close()
    assert len(list(tmp_path.glob("journal.db.broken-*"))) == 1


@pytest.mark.fault(153)
def test_a_journal_that_is_only_out_of_reach_is_left_where_it_is(tmp_path: Path) -> None:
    """Locked by another process, or in a missing folder: refused, and not quarantined."""
    held, second = (SqliteJobStore(tmp_path / "journal.db", MOST) for _ in range(2))
    held.open()
    held.accept(*waiting("job"))
    for journal in (second, SqliteJobStore(tmp_path / "absent" / "journal.db", MOST)):
        with pytest.raises(JobStoreUnavailable):
            journal.open()
    assert [path.name for path in tmp_path.iterdir() if "broken" in path.name] == []
    assert [entry.id for entry in held.unfinished()] == ["job"]
    held.close()


def to_version_2(journal: sqlite3.Connection) -> None:
    """Take from a journal what version 3 added: forms of dialects, and messages about a job's start."""
    journal.execute("ALTER TABLE jobs DROP COLUMN form")
    columns = "url TEXT NOT NULL, body TEXT NOT NULL, tries INTEGER NOT NULL DEFAULT 0, due REAL NOT NULL"
    owner = "job_id TEXT NOT NULL PRIMARY KEY REFERENCES jobs (id) ON DELETE CASCADE"
    journal.execute(f"CREATE TABLE earlier ({owner}, {columns}) WITHOUT ROWID")
    journal.execute("INSERT INTO earlier SELECT job_id, url, body, tries, due FROM messages")
    journal.execute("DROP TABLE messages")
    journal.execute("ALTER TABLE earlier RENAME TO messages")
    journal.execute("PRAGMA user_version = 2")


@pytest.mark.fault(158)
def test_a_journal_of_the_second_version_is_taken_up(tmp_path: Path) -> None:
    """Its jobs and messages are migrated, and a job can then have a message about its start."""
    journal = kept(tmp_path / "journal.db")
    with closing(sqlite3.connect(tmp_path / "journal.db")) as earlier, earlier:
        to_version_2(earlier)
    journal.open()
    assert {entry.id for entry in journal.unfinished()} == {"whole-1", "damaged", "whole-2", "job-1"}
    entry = JobRecord("new", Caller(), time.time(), webhook_url="https://hook.example/", form="{}")
    journal.accept(entry, WORK, None, "the start")
    found = journal.find("new")
    assert found is not None
    assert found.form == "{}"
    messages = {message.id: message.body for message in journal.due_messages(time.time() + 1, (9.0,))}
    assert messages == {"ended": "the body", "new.start": "the start"}
    journal.close()


@pytest.mark.fault(158)
def test_a_journal_of_the_first_version_is_taken_up(tmp_path: Path) -> None:
    """Its jobs, files, keys and messages are migrated, with each caller's share."""
    journal = kept(tmp_path / "journal.db")
    with closing(sqlite3.connect(tmp_path / "journal.db")) as base_url, base_url:
        for index in ("jobs_by_share", "claims_by_share"):
            base_url.execute(f"DROP INDEX {index}")
        for column in ("share", "bytes", "deaths", "kills"):
            base_url.execute(f"ALTER TABLE jobs DROP COLUMN {column}")
        base_url.execute("ALTER TABLE claims DROP COLUMN share")
        to_version_2(base_url)
        base_url.execute("PRAGMA user_version = 1")
    journal.open()
    assert [(entry.id, entry.share) for entry in journal.unfinished()] == [
        *((name, "address ") for name in ("whole-1", "damaged", "whole-2")),
        ("job-1", "key ann"),
    ]
    assert all(entry.bytes > 0 for entry in journal.unfinished())
    assert journal.begin_attempt("job-1") == WORK
    again = journal.claim(CLAIM, 5.0)
    assert again is not None
    assert again.job_id == "ended"
    assert [message.body for message in journal.due_messages(time.time(), 9)] == ["the body"]
    journal.close()


@pytest.mark.fault(152)
@pytest.mark.parametrize("value", [None, b"\xff", "x", "[]", "{", "9" * 5000, "[" * 9000, 5])
def test_a_damaged_entry_of_the_history_is_left_out(tmp_path: Path, value: object) -> None:
    """Damage in any column: every query finds the other entries."""
    names = [*Drawn.__slots__[:-1], "words"]
    for number, column in enumerate(names):
        index = HistoryIndex(tmp_path / f"{number}.db", 100, 0)
        index.open()
        drawn = [Drawn(f"{key}.webp", key, "red", "sdxl", "t", 1, 8, 8, "ann", 5.0, {"a": 1}) for key in "abc"]
        index.add(drawn)
        with closing(sqlite3.connect(tmp_path / f"{number}.db")) as base_url, base_url:
            base_url.execute(f"UPDATE drawn SET {column} = ? WHERE digest = 'b'", (value,))  # noqa: S608  # a column's name
        found = {entry.key for entry in index.search(HistoryQuery())}
        assert {"a.webp", "c.webp"} <= found
        assert index.find("key", "a.webp") is not None
        index.find("digest", "b")
        json.dumps([entry.prompt for entry in index.search(HistoryQuery())])
