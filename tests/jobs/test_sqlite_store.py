"""SqliteJobStore: accepted jobs are durable, a failed write leaves nothing, and records are read back unchanged."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import pytest
from job_records import CLAIM, ENTRY, RECEIPT, WHOLE, WORK

from stable_diffusion_server.errors import JobStoreUnavailable, PoisonJob, QueueFull, RequestInProgress, ServerError
from stable_diffusion_server.jobs.store.records import JobPayload, JobState, StoredProblem
from stable_diffusion_server.jobs.store.serialization import (
    dump_outcome,
    dump_request,
    load_outcome,
    load_payload,
    payload_files,
)
from stable_diffusion_server.jobs.store.sqlite_store import SqliteJobStore
from stable_diffusion_server.types import (
    Caller,
    GenerationRequest,
    GenerationResult,
    ImageInput,
    Task,
)

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[SqliteJobStore]:
    """An open job store."""
    book = SqliteJobStore(tmp_path / "journal.db", 10_000_000)
    book.open()
    yield book
    book.close()


def test_an_order_is_read_as_it_was_written() -> None:
    """Every field and its files are read back; unset fields are not written."""
    changed = {part.name for part in fields(GenerationRequest) if getattr(WHOLE, part.name) == part.default}
    assert not changed, "a new field of Order belongs into WHOLE"
    assert load_payload(dump_request(WHOLE), payload_files(WORK)) == WORK
    plain = GenerationRequest(Task.TEXT_TO_IMAGE, "a red square")
    assert dump_request(plain) == '{"version": 1, "task": "text_to_image", "prompt": "a red square"}'
    assert load_payload(dump_request(plain), {}) == JobPayload(plain)


@pytest.mark.parametrize("written", ['{"version": 2, "task": "inpaint"}', '{"version": 1, "task": "inpaint", "x": 1}'])
def test_an_order_of_another_version_is_refused(written: str) -> None:
    """Unknown fields are not guessed at."""
    with pytest.raises(ServerError, match="another version"):
        load_payload(written, {})


@pytest.mark.parametrize("outcome", [RECEIPT, StoredProblem.from_error(QueueFull("full", retry_after=3)), None])
def test_an_outcome_is_read_as_it_was_written(outcome: GenerationResult | StoredProblem | None) -> None:
    """Results and problems alike."""
    assert load_outcome(dump_outcome(outcome)) == outcome


def test_a_stored_problem_of_an_earlier_name_is_read_under_its_new_one() -> None:
    """`ends-the-server` became `poison-job`; jobs that failed before the change keep their cause."""
    problem = StoredProblem.from_error(PoisonJob("given up"))
    stored = dump_outcome(problem)
    assert stored is not None
    assert load_outcome(stored.replace("poison-job", "ends-the-server")) == problem


def test_a_problem_becomes_the_error_it_was() -> None:
    """The problem type gives status and class; an unknown future type is opaque."""
    error = StoredProblem.from_error(QueueFull("full", retry_after=3)).as_error()
    assert (type(error), error.detail, error.retry_after) == (QueueFull, "full", 3)
    assert type(StoredProblem("of-the-future", "?").as_error()) is ServerError


def test_what_was_accepted_is_there_after_the_process_has_died(tmp_path: Path) -> None:
    """A process that kills itself right after acceptance leaves the job, its files and its attempt count."""
    code = f"""
        import os, signal, sys
        sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
        from pathlib import Path
        from job_records import ENTRY, WORK
        from stable_diffusion_server.jobs import SqliteJobStore
        journal = SqliteJobStore(Path({str(tmp_path / "journal.db")!r}), 10_000_000)
        journal.open()
        journal.accept(ENTRY, WORK)
        journal.begin_attempt(ENTRY.id)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run(  # noqa: S603  # our own interpreter on a program written here
        [sys.executable, "-c", textwrap.dedent(code)], check=False
    )
    assert done.returncode == -9
    journal = SqliteJobStore(tmp_path / "journal.db", 10_000_000)
    journal.open()
    assert journal.unfinished() == [replace(ENTRY, state=JobState.RUNNING, attempts=1)]
    assert journal.begin_attempt(ENTRY.id) == WORK
    journal.close()


def test_a_job_goes_its_way(journal: SqliteJobStore) -> None:
    """Started, requeued with and without counting the attempt, finished with an outcome; then its files are deleted."""
    journal.accept(ENTRY, WORK)
    journal.begin_attempt(ENTRY.id)
    journal.requeue(ENTRY.id, forgiven=True)
    assert journal.find(ENTRY.id) == ENTRY
    journal.begin_attempt(ENTRY.id)
    journal.requeue(ENTRY.id, forgiven=False)
    assert journal.find(ENTRY.id) == replace(ENTRY, attempts=1)
    ended = replace(ENTRY, state=JobState.DONE, attempts=1, ended_at=1009.0, outcome=RECEIPT)
    journal.finish(ended)
    assert journal.find(ENTRY.id) == ended
    assert journal.unfinished() == []
    with pytest.raises(ServerError, match="damaged"):
        journal.begin_attempt(ENTRY.id)


def test_a_callers_jobs_are_listed_newest_first(journal: SqliteJobStore) -> None:
    """Only the caller's own, and no more than the limit."""
    for number, name in enumerate(["ann", "bob", "ann", "ann"]):
        journal.accept(replace(ENTRY, id=f"job-{number}", caller=Caller(name)), WORK)
    assert [entry.id for entry in journal.list_recent("ann", 2)] == ["job-3", "job-2"]
    assert journal.find("job-9") is None


def test_a_full_journal_refuses_whole_jobs_and_still_takes_ends(tmp_path: Path) -> None:
    """Above the size limit the next job is refused by name, nothing of it is written, and the others continue."""
    journal = SqliteJobStore(tmp_path / "journal.db", 400_000)
    journal.open()
    large = JobPayload(replace(WHOLE, mask=ImageInput("mask_file", data=os.urandom(100_000))), {"image_url": b"image"})
    accepted: list[str] = []

    def accept_many() -> None:
        for number in range(10):
            journal.accept(replace(ENTRY, id=f"job-{number}"), large)
            accepted.append(f"job-{number}")

    with pytest.raises(JobStoreUnavailable, match="full") as refused:
        accept_many()
    assert (refused.value.status, refused.value.retry_after) == (503, 30)
    assert 1 <= len(accepted) <= 4
    assert [entry.id for entry in journal.unfinished()] == accepted
    for job_id in accepted:
        assert journal.begin_attempt(job_id) == large
        journal.finish(replace(ENTRY, id=job_id, state=JobState.DONE, ended_at=1.0, outcome=RECEIPT), "answered")
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert size < 200_000, "what ended gives its disk space back"
    journal.accept(replace(ENTRY, id="later"), large)
    journal.close()


def test_a_journal_that_cannot_be_opened_is_reported_and_refuses(tmp_path: Path) -> None:
    """Locked by another process, of a future version, in a missing folder: each is refused and unchanged."""
    first = SqliteJobStore(tmp_path / "held.db", 10_000_000)
    first.open()
    future = SqliteJobStore(tmp_path / "future.db", 10_000_000)
    future.open()
    future.close()
    with sqlite3.connect(tmp_path / "future.db") as later:
        later.execute("PRAGMA user_version = 99")
    later.close()
    for name in ("held.db", "future.db", "absent/journal.db"):
        journal = SqliteJobStore(tmp_path / name, 10_000_000)
        with pytest.raises(JobStoreUnavailable):
            journal.open()
        with pytest.raises(JobStoreUnavailable):
            journal.accept(ENTRY, WORK)
    assert {path.name for path in tmp_path.iterdir() if "broken" in path.name} == set()
    first.close()


def test_a_key_is_answered_once_and_then_repeated(journal: SqliteJobStore) -> None:
    """Running, then the response; another caller's key is another key; a released one is free."""
    assert journal.claim(CLAIM, 1.0) is None
    waits = journal.claim(replace(CLAIM, fingerprint="other"), 2.0)
    assert waits is not None
    assert (waits.fingerprint, waits.job_id, waits.outcome) == ("print-1", None, None)
    assert journal.claim(replace(CLAIM, caller="bob"), 3.0) is None
    journal.record_response(CLAIM, RECEIPT)
    again = journal.claim(CLAIM, 4.0)
    assert again is not None
    assert again.outcome == RECEIPT
    journal.release_claim(CLAIM)
    assert journal.claim(CLAIM, 5.0) is None


def test_a_key_that_came_with_a_job_leads_to_it(journal: SqliteJobStore) -> None:
    """A second submission with the key writes nothing and returns the first job."""
    assert journal.accept(ENTRY, WORK, CLAIM) is None
    again = journal.accept(replace(ENTRY, id="job-2"), WORK, CLAIM)
    assert again is not None
    assert again.job_id == "job-1"
    assert journal.find("job-2") is None


def test_a_key_whose_request_died_with_the_process_is_free_again(tmp_path: Path) -> None:
    """No response was sent, so there is nothing to replay; a key with a response stays."""
    journal = SqliteJobStore(tmp_path / "journal.db", 10_000_000)
    journal.open()
    journal.claim(CLAIM, 1.0)
    journal.claim(replace(CLAIM, key="answered"), 1.0)
    journal.record_response(replace(CLAIM, key="answered"), RECEIPT)
    journal.close()
    journal.open()
    assert journal.claim(CLAIM, 2.0) is None
    assert journal.claim(replace(CLAIM, key="answered"), 2.0) is not None
    journal.close()


def test_messages_come_when_they_are_due_and_go_when_they_are_delivered(journal: SqliteJobStore) -> None:
    """Written with the end of the job, due at once; postponed with an attempt count."""
    waits = (10.0, 60.0)
    journal.accept(ENTRY, WORK)
    journal.finish(replace(ENTRY, state=JobState.DONE, ended_at=10.0, outcome=RECEIPT), "the body")
    (message,) = journal.due_messages(10.0, waits)
    assert (message.job_id, message.url, message.body, message.tries) == (
        "job-1",
        "https://hook.example/",
        "the body",
        0,
    )
    journal.postpone(message, 20.0)
    assert journal.due_messages(19.0, waits) == []
    assert [message.tries for message in journal.due_messages(20.0, waits)] == [1]
    journal.delete_message(message)
    assert journal.due_messages(99.0, waits) == []


def test_a_message_waits_no_longer_than_its_tries_say_whatever_the_clock_says(journal: SqliteJobStore) -> None:
    """A new message is due even if the clock was set back since its job ended; so is a postponed one."""
    waits = (10.0, 60.0)
    journal.accept(ENTRY, WORK)
    journal.finish(replace(ENTRY, state=JobState.DONE, ended_at=90_000.0, outcome=RECEIPT), "the body")
    (message,) = journal.due_messages(10.0, waits)
    journal.postpone(message, 90_010.0)
    assert journal.due_messages(90_001.0, waits) == []
    (message,) = journal.due_messages(80_000.0, waits)
    journal.postpone(message, 80_060.0)
    assert journal.due_messages(80_001.0, waits) == []
    assert len(journal.due_messages(79_000.0, waits)) == 1


def test_every_caller_and_every_receiver_has_messages_among_those_that_are_due(journal: SqliteJobStore) -> None:
    """Many messages of one caller, to many receivers, do not hide the few of another caller or receiver."""

    def ended(number: int, caller: str, url: str) -> None:
        entry = replace(ENTRY, id=f"{caller}-{number}", caller=Caller(caller), webhook_url=url, share=caller)
        journal.accept(entry, WORK)
        journal.finish(replace(entry, state=JobState.DONE, ended_at=float(number)), "body")

    for number in range(400):
        ended(number, "ann", "https://silent.example/?x=/")
    for number in range(400, 900):
        ended(number, "cid", f"https://silent-{number}.example/hook")
    ended(900, "ann", "https://good.example/")
    ended(901, "bob", "https://silent.example/")
    due = journal.due_messages(1000.0, (10.0,))
    assert {"ann-900", "bob-901"} <= {message.job_id for message in due}
    assert len([message for message in due if message.share == "cid"]) < 300


def test_the_past_is_forgotten_when_its_time_is_over(journal: SqliteJobStore) -> None:
    """Ended jobs and answered keys expire; waiting jobs stay, however old."""
    for number, ended in enumerate([5.0, 50.0]):
        entry = replace(ENTRY, id=f"job-{number}", state=JobState.DONE, ended_at=ended, outcome=RECEIPT)
        journal.accept(entry, WORK, replace(CLAIM, key=f"key-{number}"))
        journal.finish(entry, "message")
    with pytest.raises(RequestInProgress):
        journal.accept(ENTRY, WORK)
    journal.accept(replace(ENTRY, id="waits", caller=Caller("bob")), WORK)
    journal.claim(replace(CLAIM, key="waits"), 1.0)
    journal.expire(jobs_before=10.0, claims_before=2000.0)
    assert {entry.id for entry in journal.list_recent("ann", 9)} == {"job-1"}
    assert [entry.id for entry in journal.unfinished()] == ["waits"]
    assert [message.job_id for message in journal.due_messages(99.0, (10.0,))] == ["job-1"]
    assert journal.claim(replace(CLAIM, key="key-0"), 60.0) is None
    assert journal.claim(replace(CLAIM, key="waits"), 60.0) is not None
