"""`/metrics`: every question of an operator has a metric that changes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from conftest import RunningApp
from fakes import FakeDenoiser, FakeImageDenoiser, settings_in, until
from fastapi.testclient import TestClient
from squares import OutOfMemoryDenoiser

from stable_diffusion_server.app import create_app
from stable_diffusion_server.errors import NotFound, StorageUnavailable
from stable_diffusion_server.storage.instrumented import InstrumentedBucket
from stable_diffusion_server.storage.memory import MemoryBucket

pytestmark = pytest.mark.slow

CREATE = "/create_and_upload_image"
KEY = {"X-API-Key": "secret-of-anna"}


def figure(text: str, name: str) -> float:
    """A metric by its full name with labels, 0 when absent."""
    return next((float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(name + " ")), 0.0)


def test_refusals_are_counted_by_reason_and_key(run_app: Callable[..., RunningApp]) -> None:
    """By reason and by key name, never its secret; callers without a key have an empty name."""
    running_app = run_app(api_keys="anna:secret-of-anna")
    order = {"prompt": "a red square", "width": 64, "height": 64}
    for _ in range(3):
        assert running_app.client.get(CREATE, params=order).status_code == 401
    assert running_app.client.get(CREATE, params={**order, "width": 1}, headers=KEY).status_code == 422
    assert running_app.client.get("/nowhere", headers=KEY).status_code == 404
    assert running_app.client.get(CREATE, params=order, headers={"host": "evil.example"}).status_code == 421
    text = running_app.client.get("/metrics", headers=KEY).text
    assert figure(text, 'sds_refusals_total{key="",reason="unauthorized"}') == 3
    assert figure(text, 'sds_refusals_total{key="anna",reason="invalid-input"}') == 1
    assert figure(text, 'sds_refusals_total{key="anna",reason="not-found"}') == 1
    assert figure(text, 'sds_refusals_total{key="",reason="misdirected"}') == 1
    assert "secret-of-anna" not in text


def test_what_callers_invent_makes_no_figures_of_its_own(running_app: RunningApp) -> None:
    """A path, a name or a prompt never becomes a label, so nobody can fill the memory with them."""
    before = len(running_app.client.get("/metrics").text.splitlines())
    for number in range(30):
        running_app.client.get(f"/invented/{number}")
        running_app.client.get(f"/files/{number}.webp")
        running_app.client.get(f"/jobs/{number}")
    text = running_app.client.get("/metrics").text
    assert "invented" not in text
    assert figure(text, 'sds_http_requests_total{route="/files/{key:path}",status="404"}') == 30
    assert len(text.splitlines()) - before < 100, "a line for each bucket of a few doors"


def test_waits_groups_and_stages_are_measured(run_app: Callable[..., RunningApp]) -> None:
    """Queue time, batch size, and the seconds of each stage."""
    squares = FakeDenoiser(gate=threading.Event())
    assert squares.gate is not None
    running_app = run_app(squares, max_batch=4)
    with ThreadPoolExecutor(4) as pool:
        drawn = [pool.submit(running_app.draw, prompt=f"a red square {number}") for number in range(4)]
        until(lambda: running_app.metric("sds_queue_running") + running_app.metric("sds_queue_waiting") == 4)
        squares.gate.set()
        assert [each.result().status_code for each in drawn] == [200] * 4
    text = running_app.client.get("/metrics").text
    assert figure(text, "sds_queue_seconds_count") == 4
    assert figure(text, "sds_batch_size_count") == figure(text, "sds_steps_total") == 16
    assert figure(text, "sds_batch_size_sum") > 16, "some steps were shared"
    for stage in ("queue", "prepare", "denoise", "decode", "encode", "store", "total"):
        assert figure(text, f'sds_stage_seconds_count{{stage="{stage}"}}') == 4


def test_guards_retries_and_failures_are_counted_by_their_cause(run_app: Callable[..., RunningApp]) -> None:
    """A black image, a restart for lack of memory, a failure."""
    running_app = run_app(FakeImageDenoiser(spoil=["black"]))
    assert running_app.draw(prompt="a red square").status_code == 200
    assert running_app.draw(prompt="an unpreparable square").status_code == 500
    text = running_app.client.get("/metrics").text
    assert (
        sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith("sds_quality_checks_total{"))
        >= 1
    )
    assert figure(text, 'sds_job_failures_total{kind="internal-error"}') == 1


def test_what_is_started_again_is_counted(run_app: Callable[..., RunningApp]) -> None:
    """The device had no memory for the step until some was freed; the request succeeded."""
    running_app = run_app(OutOfMemoryDenoiser(fits=0, frees=1))
    assert running_app.draw(prompt="a red square").status_code == 200
    assert running_app.metric('sds_job_retries_total{cause="out-of-memory"}') == 1


def test_jobs_and_their_journal_have_figures(run_app: Callable[..., RunningApp]) -> None:
    """Jobs accepted and not ended, and the bytes of the job store."""
    squares = FakeDenoiser(gate=threading.Event())
    assert squares.gate is not None
    running_app = run_app(squares, jobs_concurrency=1)
    for number in range(3):
        asked = {"prompt": f"a red square {number}", "width": 64, "height": 64}
        assert running_app.client.post(CREATE, json=asked, headers={"Prefer": "respond-async"}).status_code == 202
    until(lambda: running_app.metric('sds_accepted_jobs{state="running"}') == 1)
    assert running_app.metric('sds_accepted_jobs{state="waiting"}') == 2
    assert running_app.metric("sds_journal_bytes") > 0
    assert running_app.metric("sds_journal_usable") == 1
    squares.gate.set()
    until(lambda: running_app.metric('sds_accepted_jobs{state="waiting"}') == 0)


def test_readiness_is_a_figure(tmp_path: Path) -> None:
    """0 while the models load, 1 afterwards."""
    gate = threading.Event()

    def load(settings: object) -> FakeDenoiser:
        gate.wait(30)
        return FakeDenoiser()

    app = create_app(settings_in(tmp_path), load=load)
    with TestClient(app, base_url="http://127.0.0.1", client=("127.0.0.1", 5)) as client:
        assert figure(client.get("/metrics").text, "sds_ready") == 0
        gate.set()
        until(lambda: figure(client.get("/metrics").text, "sds_ready") == 1)


def test_calls_to_a_bucket_are_timed_and_their_failures_counted() -> None:
    """A call that returns "not found" succeeded; errors are failures."""
    reported: list[tuple[str, bool]] = []
    bucket = MemoryBucket()
    timed = InstrumentedBucket(bucket, lambda call, seconds, failed: reported.append((call, failed)))
    timed.open()
    timed.create("a", b"x", "image/webp", {})
    with pytest.raises(NotFound):
        timed.read("absent")
    bucket.stat = _down  # type: ignore[method-assign]  # the one call that fails
    with pytest.raises(StorageUnavailable):
        timed.stat("a")
    assert reported == [("open", False), ("create", False), ("read", False), ("stat", True)]


def test_the_embedded_models_tell_what_they_are(server: object) -> None:
    """Model revision, size in bytes, and free device memory."""
    text = httpx.get(f"{server.url}/metrics").text  # type: ignore[attr-defined]  # conftest's Server
    assert 'sds_model_info{device="cpu"' in text
    assert figure(text, 'sds_model_bytes{name="sdxl"}') > 1e6
    assert figure(text, 'sds_device_memory_bytes{device="cpu",kind="free"}') > 1e6
    assert "sds_build_info{" in text


def _down(key: str) -> None:
    raise StorageUnavailable("The bucket does not answer.")
