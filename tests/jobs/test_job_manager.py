"""JobManager over a fake model: accept, run in turn, cancel, expire, recover after a crash."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeDenoiser, until
from service_harness import OPTIONS, order
from standardwebhooks import Webhook, WebhookVerificationError

from stable_diffusion_server.engine import Engine, EngineState
from stable_diffusion_server.errors import (
    DeviceLost,
    JobStoreUnavailable,
    NotFound,
    NotReady,
    QueueFull,
    RemoteFetchFailed,
    RequestInProgress,
)
from stable_diffusion_server.generation.service import GenerationService
from stable_diffusion_server.jobs.events import JobEvent, JobStatus
from stable_diffusion_server.jobs.manager import JobManager
from stable_diffusion_server.jobs.policy import JobPolicy
from stable_diffusion_server.jobs.store.records import JobPayload, JobRecord, JobState, StoredProblem
from stable_diffusion_server.jobs.store.sqlite_store import SqliteJobStore
from stable_diffusion_server.observability.crash_reports import DeviceRecord
from stable_diffusion_server.storage.local import LocalBucket
from stable_diffusion_server.types import Caller, GenerationRequest, GenerationResult

pytestmark = pytest.mark.slow

ANN, BOB = Caller("ann"), Caller("bob")


@dataclass
class Ear:
    """A webhook receiver that fails the first `deaf` times."""

    deaf: int = 0
    heard: list[tuple[str, bytes, Mapping[str, str]]] = field(default_factory=list)

    async def check(self, url: str, share: str = "") -> None:
        assert url.startswith("https://")

    async def post(self, url: str, body: bytes, headers: Mapping[str, str], share: str = "") -> int:
        if self.deaf > 0:
            self.deaf -= 1
            raise RemoteFetchFailed("no connection")
        self.heard.append((url, body, headers))
        return 204

    def close(self) -> None:
        pass


class Office:
    """A job manager over a fake model, in a folder."""

    def __init__(self, folder: Path, painter: FakeDenoiser, rules: JobPolicy, ear: Ear) -> None:
        self.painter = painter
        self.bucket = LocalBucket(folder / "bucket")
        self.bucket.open()
        record = DeviceRecord(folder)
        self.engine: Engine[Any] = Engine(lambda: painter, queue_limit=64, max_batch=4, on_occupancy=record.update)
        self.engine.start()
        until(lambda: self.engine.state is EngineState.READY)

        async def fetch(url: str, parameter: str, *, share: str = "") -> bytes:
            raise RemoteFetchFailed("nothing there", field=parameter)

        async def decode(data: bytes, parameter: str, *, transparency: bool = False, share: str = "") -> Any:
            raise AssertionError("no pictures come here")

        service = GenerationService(self.bucket, self.engine, painter.count_tokens, OPTIONS, fetch=fetch, decode=decode)
        self.jobs = JobManager(
            service, SqliteJobStore(folder / "journal.db", 10_000_000), rules, lambda record: record.id, ear, record
        )

    async def accepted(self, order: GenerationRequest, caller: Caller = ANN, **more: Any) -> JobStatus:
        standing = await self.jobs.accept(order, caller, **more)
        assert isinstance(standing, JobStatus)
        return standing

    async def ended(self, job_id: str, caller: Caller = ANN) -> JobStatus:
        assert (await self.jobs.status(job_id, caller)).id == job_id
        return await self.jobs.wait_for(job_id, caller, 20)

    async def happened(self, job_id: str, after: str | None = None) -> list[JobEvent]:
        happenings = await self.jobs.follow(job_id, ANN, after)
        assert happenings is not None
        async with asyncio.timeout(20):
            return [happening async for happening in happenings if happening is not None]

    async def close(self, grace: float = 0.0) -> None:
        """Stop like a process after SIGTERM; running jobs get no time to finish."""
        await self.jobs.stop(grace)
        if self.painter.gate is not None:
            self.painter.gate.set()
        await asyncio.to_thread(self.engine.stop, 10)


MakeOffice = Callable[..., Any]


@pytest.fixture
async def office_of(tmp_path: Path) -> AsyncIterator[MakeOffice]:
    """Open a manager; the second one recovers what the first left."""
    made: list[Office] = []

    async def make(painter: FakeDenoiser | None = None, ear: Ear | None = None, **rules: Any) -> Office:
        if made:
            await made[-1].close()
        made.append(Office(tmp_path, painter or FakeDenoiser(), JobPolicy(**rules), ear or Ear()))
        await made[-1].jobs.start()
        return made[-1]

    yield make
    if made:
        await made[-1].close()


async def test_an_accepted_job_is_drawn_and_can_be_asked_after(office_of: MakeOffice) -> None:
    """Queued at first, finally done with its result; the image is stored."""
    office = await office_of()
    accepted = await office.accepted(order())
    assert accepted.state is JobState.QUEUED
    done = await office.ended(accepted.id)
    assert (done.state, done.attempts) == (JobState.DONE, 1)
    assert isinstance(done.outcome, GenerationResult)
    assert office.bucket.stat(done.outcome.key) is not None
    assert [standing.id for standing in await office.jobs.list_jobs(ANN)] == [accepted.id]


async def test_a_job_is_seen_and_cancelled_by_its_caller_alone(office_of: MakeOffice) -> None:
    """For any other caller it does not exist."""
    office = await office_of(FakeDenoiser(gate=threading.Event()))
    job_id = (await office.accepted(order())).id
    for ask in (office.jobs.status, office.jobs.cancel):
        with pytest.raises(NotFound):
            await ask(job_id, BOB)
    with pytest.raises(NotFound):
        await office.jobs.follow(job_id, BOB, None)
    assert await office.jobs.list_jobs(BOB) == []
    assert (await office.jobs.cancel(job_id, ANN)).state is JobState.CANCELLED


async def test_the_events_of_a_job_are_sent_in_order_and_from_any_point_on(office_of: MakeOffice) -> None:
    """Queued, start, each step, done; a client that resumes with an event id gets only later events."""
    office = await office_of(FakeDenoiser(seconds_per_step=0.02))
    job_id = (await office.accepted(order())).id
    reported = await office.happened(job_id)
    assert [(event.kind, event.status.step) for event in reported if event.kind != "queued"] == [
        *(("step", number) for number in range(5)),
        ("done", 4),
    ]
    assert len({event.id for event in reported}) == len(reported)
    assert reported[-1].id == "end"
    again = await office_of()
    assert [event.kind for event in await again.happened(job_id, reported[2].id)] == ["done"]
    assert await again.jobs.follow(job_id, ANN, "end") is None


async def test_who_follows_a_job_may_go_on_where_it_was(office_of: MakeOffice) -> None:
    """The events after an id, while the job is still running."""
    gate = threading.Event()
    office = await office_of(FakeDenoiser(gate=gate))
    job_id = (await office.accepted(order())).id
    await asyncio.to_thread(until, lambda: bool(office.painter.batches))
    happenings = await office.jobs.follow(job_id, ANN, None)
    first = [await anext(happenings)]
    while first[-1].kind != "step":
        first.append(await anext(happenings))
    await happenings.aclose()
    gate.set()
    rest = await office.happened(job_id, first[-1].id)
    assert [(event.kind, event.status.step) for event in rest] == [
        *(("step", number) for number in range(1, 5)),
        ("done", 4),
    ]


async def test_jobs_that_were_not_done_are_drawn_after_a_restart_and_end_once(office_of: MakeOffice) -> None:
    """Queued and running ones alike; an attempt that an orderly stop ended does not count."""
    office = await office_of(FakeDenoiser(gate=threading.Event()), concurrency=2)
    ids = [(await office.accepted(order(f"a red square {n}"))).id for n in range(5)]
    await asyncio.to_thread(until, lambda: bool(office.painter.batches))
    again = await office_of()
    for job_id in ids:
        done = await again.ended(job_id)
        assert (done.state, done.attempts) == (JobState.DONE, 1)
    assert len(again.painter.finished) == 5


@pytest.mark.fault(56)
async def test_a_job_on_which_the_process_died_three_times_is_failed_by_name(
    office_of: MakeOffice, tmp_path: Path
) -> None:
    """After the first crash it runs alone; after three not at all. The number of starts alone does not count."""
    journal = SqliteJobStore(tmp_path / "journal.db", 10_000_000)
    journal.open()
    for job_id, crashes in (("suspect", 2), ("deadly", 3), ("innocent", 0)):
        prompt = f"a red square {job_id}"
        journal.accept(JobRecord(job_id, ANN, time.time()), JobPayload(order(prompt)))
        for _ in range(5):
            journal.begin_attempt(job_id)
        journal.save_crash_counts(JobRecord(job_id, ANN, time.time(), crashes=crashes))
    journal.close()
    office = await office_of()
    assert (await office.ended("innocent")).state is JobState.DONE
    assert (await office.ended("suspect")).state is JobState.DONE
    assert all(len(batch) == 1 for batch in office.painter.batches)
    deadly = await office.ended("deadly")
    assert isinstance(deadly.outcome, StoredProblem)
    assert (deadly.state, deadly.outcome.kind) == (JobState.FAILED, "poison-job")
    assert not any("deadly" in job.prompt for job in office.painter.prepared)


async def test_a_failure_is_reported(office_of: MakeOffice) -> None:
    """An exception during generation becomes the job's outcome, opaque unless it is one of our errors."""
    office = await office_of()
    job_id = (await office.accepted(order("unsteppable"))).id
    failed = await office.ended(job_id)
    assert failed.state is JobState.FAILED
    assert isinstance(failed.outcome, StoredProblem)
    assert failed.outcome.kind == "internal-error"


async def test_waiting_jobs_are_cancelled_and_expire(office_of: MakeOffice) -> None:
    """Neither ever runs, and the jobs behind them move up."""
    gate = threading.Event()
    office = await office_of(FakeDenoiser(gate=gate), concurrency=1)
    ids = [(await office.accepted(order(f"a red square {n}"))).id for n in range(2)]
    hasty = (await office.accepted(order("a red square in haste", timeout=0.05))).id
    last = (await office.accepted(order("a red square at last"))).id
    await asyncio.to_thread(until, lambda: bool(office.painter.batches))
    assert (await office.jobs.status(last, ANN)).position == 3
    assert (await office.jobs.cancel(ids[1], ANN)).state is JobState.CANCELLED
    expired = await office.ended(hasty)
    assert isinstance(expired.outcome, StoredProblem)
    assert expired.outcome.kind == "deadline-exceeded"
    assert (await office.jobs.status(last, ANN)).position == 1
    gate.set()
    assert (await office.ended(last)).state is JobState.DONE
    assert len(office.painter.prepared) == 2


async def test_a_job_is_not_too_late_because_the_clock_was_set(
    office_of: MakeOffice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The timeout uses the monotonic clock; only across a restart does the system time count."""
    gate = threading.Event()
    office = await office_of(FakeDenoiser(gate=gate), concurrency=1)
    ids = [(await office.accepted(order(f"a red square {n}", timeout=60.0))).id for n in range(2)]
    right = time.time
    monkeypatch.setattr(time, "time", lambda: right() + 86_400)
    gate.set()
    for job_id in ids:
        assert (await office.ended(job_id)).state is JobState.DONE


async def test_callers_take_turns(office_of: MakeOffice) -> None:
    """A caller with one job does not wait for all earlier jobs of another caller."""
    gate = threading.Event()
    office = await office_of(FakeDenoiser(gate=gate), concurrency=2)
    many = [(await office.accepted(order(f"a red square {n}"))).id for n in range(6)]
    one = (await office.accepted(order("a blue square"), BOB)).id
    gate.set()
    await office.ended(one, BOB)
    for job_id in many:
        await office.ended(job_id)
    assert [job.prompt for job in office.painter.prepared].index("a blue square") <= 3


async def test_too_many_jobs_and_a_stopping_server_are_refused(office_of: MakeOffice) -> None:
    """429 above the limit, 503 during shutdown, 409 for an id in use; accepted jobs stay."""
    office = await office_of(FakeDenoiser(gate=threading.Event()), concurrency=1, max_queued=2)
    job_id = "an-id-of-the-caller"
    await office.accepted(order("a red square"), job_id=job_id)
    with pytest.raises(RequestInProgress):
        await office.accepted(order("a red square"), job_id=job_id)
    await asyncio.to_thread(until, lambda: bool(office.painter.batches))
    for number in range(2):
        await office.accepted(order(f"a red square {number}"))
    with pytest.raises(QueueFull):
        await office.accepted(order("one more"))
    office.jobs.drain()
    with pytest.raises(NotReady):
        await office.accepted(order("later"))


async def test_a_random_seed_is_chosen_when_a_job_is_accepted(office_of: MakeOffice) -> None:
    """So a job that runs again after a crash gives the same image under the same name."""
    office = await office_of(FakeDenoiser(gate=threading.Event()))
    job_id = (await office.accepted(order(seed="random"))).id
    await asyncio.to_thread(until, lambda: bool(office.painter.batches))
    seed = office.painter.prepared[0].seed
    again = await office_of()
    done = await again.ended(job_id)
    assert isinstance(done.outcome, GenerationResult)
    assert done.outcome.seed == seed


async def test_a_webhook_is_sent_until_it_is_received(office_of: MakeOffice) -> None:
    """Fails twice, succeeds the third time, signed; messages pending at a restart are sent after it."""
    rules = {"webhook_secret": "secret", "webhook_backoff": (0.02,)}
    office = await office_of(ear=Ear(deaf=10**6), **rules)
    job_id = (await office.accepted(order(webhook_url="https://hook.example/done"))).id
    await office.ended(job_id)
    await asyncio.sleep(0.1)
    ear = Ear(deaf=2)
    await office_of(ear=ear, **rules)
    await asyncio.to_thread(until, lambda: bool(ear.heard))
    await asyncio.sleep(0.1)
    ((url, body, headers),) = ear.heard
    assert (url, body, headers["webhook-id"]) == ("https://hook.example/done", job_id.encode(), job_id)
    Webhook(b"secret").verify(body, dict(headers), json_parse=False)
    with pytest.raises(WebhookVerificationError):
        Webhook(b"secret").verify(body + b" ", dict(headers), json_parse=False)


async def test_a_journal_that_is_held_is_opened_when_it_is_let_go(office_of: MakeOffice, tmp_path: Path) -> None:
    """While the store is locked, jobs are refused; then the manager recovers its jobs."""
    held = SqliteJobStore(tmp_path / "journal.db", 10_000_000)
    held.open()
    held.accept(JobRecord("left-behind", ANN, time.time()), JobPayload(order()))
    office = await office_of(reopen_seconds=0.05)
    assert not office.jobs.usable
    with pytest.raises(JobStoreUnavailable):
        await office.accepted(order())
    held.close()
    await asyncio.to_thread(until, lambda: office.jobs.usable)
    assert (await office.ended("left-behind")).state is JobState.DONE


@pytest.mark.fault(53)
async def test_a_job_that_loses_the_device_is_tried_elsewhere_and_at_last_given_up(office_of: MakeOffice) -> None:
    """Each engine failure during the job counts as a crash; a job that only waited is not blamed."""

    class Lost(FakeDenoiser):
        def step(self, states: Any) -> None:
            self.batches.append([state.job.prompt for state in states])
            if any("poison" in state.job.prompt for state in states):
                raise DeviceLost("The device is lost.")
            super().step(states)

    office = await office_of(Lost(), concurrency=1)
    poison = (await office.accepted(order("poison"))).id
    waits = (await office.accepted(order("a red square"))).id
    for attempts in (1, 2):
        engine = office.engine
        await asyncio.to_thread(until, lambda engine=engine: engine.state is EngineState.FAILED)
        async with asyncio.timeout(20):
            while (await office.jobs.status(poison, ANN)).state is not JobState.QUEUED:  # noqa: ASYNC110  # a test's wait
                await asyncio.sleep(0.01)
        assert (await office.jobs.status(poison, ANN)).attempts == attempts
        office = await office_of(Lost(), concurrency=1)
    given_up = await office.ended(poison)
    assert isinstance(given_up.outcome, StoredProblem)
    assert given_up.outcome.kind == "poison-job"
    office = await office_of(Lost(), concurrency=1)
    assert (await office.ended(waits)).state is JobState.DONE
