"""No caller can fill a shared resource (engine queue, job queue, job store): a newcomer finds a place."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import RunningApp
from fakes import FakeDenoiser, until
from job_records import CLAIM, ENTRY, RECEIPT, WORK
from squares import EngineOf
from squares import job as small

from stable_diffusion_server.concurrency.fair_limiter import may_hold_more
from stable_diffusion_server.errors import JobStoreUnavailable, QueueFull
from stable_diffusion_server.jobs.events import JobEventLog
from stable_diffusion_server.jobs.job_queue import JobAdmission, JobQueue
from stable_diffusion_server.jobs.store.records import IdempotencyClaim, JobPayload, JobState
from stable_diffusion_server.jobs.store.sqlite_store import SqliteJobStore
from stable_diffusion_server.jobs.tracked_job import JobHandle
from stable_diffusion_server.types import Caller, ImageInput

ANN, BOB = "key ann", "key bob"
KEYS = {"api_keys": "ann:a, bob:b, cid:c"}


def taken_by(callers: int, places: int) -> list[int]:
    """What each of so many callers gets if all take as much as possible, in turns."""
    held = [0] * callers
    while any(may_hold_more(mine, places - sum(held)) for mine in held):
        for number in range(callers):
            if may_hold_more(held[number], places - sum(held)):
                held[number] += 1
    return held


@pytest.mark.fault(154, 156)
@pytest.mark.parametrize(
    ("callers", "places", "each"), [(1, 32, 29), (1, 1000, 900), (1, 1, 1), (1, 9, 9), (2, 1000, 474), (5, 1000, 196)]
)
def test_who_wants_all_gets_most_and_leaves_some(callers: int, places: int, each: int) -> None:
    """Alone nine tenths, or all of a small capacity; together equal parts, with a rest for a newcomer."""
    held = taken_by(callers, places)
    assert max(held) <= each
    assert max(held) - min(held) <= 1
    assert sum(held) >= min(places, 0.85 * places)
    assert may_hold_more(0, places - sum(held)) or places < 10


@pytest.mark.fault(156)
def test_a_flood_leaves_places_in_the_queue_for_the_device(engine_of: EngineOf, gated: FakeDenoiser) -> None:
    """Of 32 places a flood gets 29, and its error names its share; another caller gets a place; jobs are unaffected."""
    engine = engine_of(gated, max_batch=1)
    engine.submit(small("on the device"), owner=ANN)
    until(lambda: engine.running == 1)
    for number in range(29):
        engine.submit(small(f"flood {number}"), owner=ANN)
    with pytest.raises(QueueFull, match="29 of them for the key 'ann': its share of 32"):
        engine.submit(small("one more"), owner=ANN)
    engine.submit(small("another's"), owner=BOB)
    engine.submit(small("an accepted job"), owner=ANN, background=True)
    engine.check_open(BOB)
    with pytest.raises(QueueFull):
        engine.check_open(ANN)
    assert gated.gate is not None
    gated.gate.set()


@pytest.mark.fault(156)
def test_a_flood_of_jobs_leaves_places_for_those_of_others(run_app: Callable[..., RunningApp]) -> None:
    """Of 20 waiting places one key gets 18: 429 names its share; other keys can submit."""
    squares = FakeDenoiser(gate=threading.Event())
    running_app = run_app(squares, **KEYS, jobs_max_queued=20, jobs_concurrency=1)

    def hand_in(secret: str, number: int) -> tuple[int, str]:
        asked = {"prompt": f"a red square {number}", "width": 64, "height": 64}
        headers = {"X-API-Key": secret, "Prefer": "respond-async"}
        answer = running_app.client.post("/create_and_upload_image", json=asked, headers=headers)
        return answer.status_code, answer.text

    assert hand_in("a", 0)[0] == 202
    until(lambda: bool(squares.batches))
    flood = [hand_in("a", number) for number in range(1, 25)]
    assert [status for status, _ in flood] == [202] * 18 + [429] * 6
    assert "18 of them for the key 'ann'" in flood[-1][1]
    assert [hand_in("b", 1)[0], hand_in("c", 1)[0]] == [202, 202]
    assert squares.gate is not None
    squares.gate.set()


@pytest.mark.fault(154)
def test_the_pictures_of_one_callers_waiting_jobs_do_not_fill_the_journal() -> None:
    """A caller of large jobs is refused at its share of the bytes, a newcomer is not; bytes being written count."""
    queue = JobQueue(concurrency=1)
    admission = JobAdmission(queue, 1000, 100_000)
    for size in (30_000, 30_000, 28_000):
        queue.append(
            JobHandle(replace(ENTRY, id=f"job of {size}-{queue.waiting}", share=ANN, bytes=size), JobEventLog("1"))
        )
    with pytest.raises(QueueFull, match="key 'ann'"):
        admission.check(ANN, 5_000)
    admission.check(BOB, 5_000)
    admission.check(ANN, 1_000)
    entering = replace(ENTRY, id="entering", share=ANN, bytes=2_000)
    with admission.reserve(entering), pytest.raises(QueueFull):
        admission.check(ANN, 1_000)


def full(path: Path, callers: dict[str, int], *, messages: bool = False) -> SqliteJobStore:
    """A small job store full of these callers' ended jobs, in turns, except for what the last one leaves."""
    journal = SqliteJobStore(path, 300_000)
    journal.open()
    number = 0
    for name, most in callers.items():
        for _ in range(most):
            entry = replace(ENTRY, id=f"job-{number}", caller=Caller(name), share=f"key {name}", bytes=4_000)
            journal.accept(entry, JobPayload(replace(WORK.request, prompt="x" * 3_000, mask=None, image=None)))
            ended = replace(entry, state=JobState.DONE, ended_at=float(number), outcome=RECEIPT)
            journal.finish(ended, "message" if messages else None)
            number += 1
    return journal


@pytest.mark.fault(154)
@pytest.mark.parametrize("messages", [False, True])
def test_ended_jobs_of_the_largest_holder_give_way_the_oldest_first(tmp_path: Path, messages: bool) -> None:
    """A flood of many is accepted and evicts its own oldest; those of others stay, with pending webhooks or not."""
    journal = full(tmp_path / "journal.db", {"bob": 5, "ann": 90}, messages=messages)
    assert len(journal.list_recent("bob", 99)) == 5, "the small holder's are all there"
    left = [entry.id for entry in journal.list_recent("ann", 999)]
    assert 20 < len(left) < 90
    assert left == [f"job-{number}" for number in range(94, 94 - len(left), -1)], "the newest are there"
    journal.accept(replace(ENTRY, id="newcomer", caller=Caller("cid"), share="key cid"), WORK)
    assert journal.find("newcomer") is not None
    journal.close()


@pytest.mark.fault(154)
def test_answered_keys_of_one_caller_give_way_too(tmp_path: Path) -> None:
    """Idempotency keys of answered requests fill the store like jobs; those that run stay."""
    journal = full(tmp_path / "journal.db", {"bob": 3})
    journal.claim(replace(CLAIM, key="under way", share="key ann"), 0.0)
    for number in range(700):
        claim = IdempotencyClaim("ann", f"key-{number}", "print" * 20, "key ann")
        journal.claim(claim, float(number))
        journal.record_response(claim, RECEIPT)
    assert journal.claim(replace(CLAIM, key="under way", share="key ann"), 0.0) is not None
    assert journal.claim(IdempotencyClaim("ann", "key-699", "print" * 20, "key ann"), 0.0) is not None
    assert journal.claim(IdempotencyClaim("ann", "key-0", "print" * 20, "key ann"), 0.0) is None, "the oldest gave way"
    assert len(journal.list_recent("bob", 9)) == 3
    journal.close()


@pytest.mark.fault(154)
def test_what_has_not_ended_never_gives_way(tmp_path: Path) -> None:
    """When it is full of waiting jobs, the next one is refused, and all accepted ones are there."""
    journal = SqliteJobStore(tmp_path / "journal.db", 400_000)
    journal.open()
    large = JobPayload(replace(WORK.request, image=None, mask=ImageInput("mask_file", data=bytes(90_000))))
    accepted: list[str] = []

    def accept_many() -> None:
        for number in range(9):
            journal.accept(replace(ENTRY, id=f"job-{number}", share=ANN), large)
            accepted.append(f"job-{number}")

    with pytest.raises(JobStoreUnavailable, match="full"):
        accept_many()
    assert accepted
    assert [entry.id for entry in journal.unfinished()] == accepted
    journal.close()
