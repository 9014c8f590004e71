"""Routes for the operator: health, readiness, metrics, heartbeat."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import RunningApp
from fakes import FakeDenoiser, disc, file_of, settings_in, until
from fastapi.testclient import TestClient

from stable_diffusion_server.app import create_app
from stable_diffusion_server.errors import ModelLoadError

pytestmark = pytest.mark.slow


def test_the_process_is_alive_before_it_can_draw(tmp_path: Path) -> None:
    """While the models load: /healthz 200, /readyz 503 with the reason, requests 503 with Retry-After; then all 200."""
    gate = threading.Event()

    def load(settings: object) -> FakeDenoiser:
        gate.wait(30)
        return FakeDenoiser()

    app = create_app(settings_in(tmp_path), load=load)
    with TestClient(app, base_url="http://127.0.0.1", client=("127.0.0.1", 5)) as client:
        order = {"prompt": "a red square", "width": 64, "height": 64}
        assert client.get("/healthz").json() == {"status": "ok"}
        early = client.get("/readyz")
        assert (early.status_code, early.json()["missing"]) == (503, ["The models are loading."])
        refused = client.get("/create_and_upload_image", params=order)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
        gate.set()
        until(lambda: client.get("/readyz").status_code == 200)
        assert client.get("/create_and_upload_image", params=order).status_code == 200


def test_models_that_cannot_be_loaded_leave_the_server_up_and_are_reported(tmp_path: Path) -> None:
    """/readyz gives the reason, and stored images are still served."""

    def load(settings: object) -> FakeDenoiser:
        raise ModelLoadError("The model sdxl is missing: no model_index.json in embedded-sdxl.")

    app = create_app(settings_in(tmp_path), load=load)
    with TestClient(app, base_url="http://127.0.0.1", client=("127.0.0.1", 5)) as client:
        until(lambda: "missing: no" in client.get("/readyz").text)
        assert client.get("/healthz").status_code == 200
        assert client.get("/create_and_upload_image?prompt=a").status_code == 503


def test_a_bucket_that_cannot_be_opened_is_reported(tmp_path: Path) -> None:
    """A file where the folder should be: one sentence in /readyz, 503 for requests, no crash."""
    (tmp_path / "bucket").write_text("in the way")
    app = create_app(settings_in(tmp_path), load=lambda settings: FakeDenoiser())
    with TestClient(app, base_url="http://127.0.0.1", client=("127.0.0.1", 5)) as client:
        until(lambda: len(client.get("/readyz").json()["missing"]) == 1)
        assert "folder of pictures" in client.get("/readyz").json()["missing"][0]
        assert client.get("/create_and_upload_image?prompt=a").status_code == 503
        assert 'outcome="started"' not in client.get("/metrics").text, "nothing is drawn in vain"
        (tmp_path / "bucket").unlink()
        assert client.get("/readyz").status_code == 200, "a mended folder is noticed without a restart"
        assert client.get("/create_and_upload_image?prompt=a").status_code == 200


def test_the_figures_count_what_happened(running_app: RunningApp) -> None:
    """One generated, one cached: the counters match, and steps are counted."""
    for _ in range(2):
        running_app.draw(prompt="a red square", save_path="a.webp")
    assert running_app.metric('sds_jobs_total{outcome="done"}') == 1
    assert running_app.metric('sds_generations_total{source="drawn"}') == 1
    assert running_app.metric('sds_generations_total{source="cached"}') == 1
    assert running_app.metric("sds_steps_total") == 4


def test_the_heartbeat_is_written_while_drawing(running_app: RunningApp) -> None:
    """After an image, progress.txt holds a time of day, as the seed document says, and no request is in progress."""
    running_app.draw(prompt="a red square")
    text = (running_app.folder / "data" / "progress.txt").read_text()
    time_of_day, under_way = text.splitlines()
    assert len(time_of_day.split(":")) == 3
    assert under_way == "0"


def test_keys_and_prompts_stay_out_of_the_log(
    run_app: Callable[..., RunningApp], capfd: pytest.CaptureFixture[str]
) -> None:
    """Requests are logged by path and id; an error's traceback has no local variables."""
    running_app = run_app(api_keys="hunter2", log_format="json")
    headers = {"X-API-Key": "hunter2", "X-Request-ID": "the-id"}
    for prompt in ("a secret square", "an unpreparable secret square"):
        running_app.client.get("/create_and_upload_image", params={"prompt": prompt}, headers=headers)
    running_app.client.get(
        "/create_and_upload_image", params={"prompt": "a secret square"}, headers={"X-API-Key": "hunter3"}
    )
    logged = "".join(capfd.readouterr())
    assert '"request_id": "the-id"' in logged
    assert "cannot prepare this" in logged
    assert not [word for word in ("secret", "hunter2", "hunter3") if word in logged]


@pytest.mark.fault(112)
@pytest.mark.parametrize("part", ["decoder", "jobs"])
def test_what_makes_no_progress_is_reported_and_stops_the_beat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """Work that never ends, even when cancelled: /readyz names it, and the heartbeat stops for the watchdog."""
    let_go = threading.Event()

    async def deaf(*given: object, **named: object) -> None:
        while not let_go.is_set():
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(0.02)
        raise ModelLoadError("let go")

    package = "stable_diffusion_server"
    owner, reported = {
        "decoder": (f"{package}.imaging.sandbox.pool._WorkerProcess.ask", "The decoder of pictures makes no progress"),
        "jobs": (f"{package}.generation.service.GenerationService.generate", "Accepted jobs make no progress"),
    }[part]
    monkeypatch.setattr(owner, deaf)
    monkeypatch.setattr(f"{package}.imaging.sandbox.pool._STALL_MARGIN", 0.2)
    monkeypatch.setattr(f"{package}.jobs.worker._STALL_SLACK_SECONDS", 0.2)
    monkeypatch.setattr(f"{package}.observability.event_loop_heartbeat._SECONDS", 0.05)
    settings = settings_in(tmp_path, decode_timeout=0.2, max_timeout=0.5 if part == "jobs" else 600.0)
    app = create_app(settings, load=lambda settings: FakeDenoiser())
    beat = tmp_path / "data" / "event-loop.txt"
    with TestClient(app, base_url="http://127.0.0.1", client=("127.0.0.1", 5)) as client:
        until(lambda: client.get("/readyz").status_code == 200 and beat.exists())
        sent = client.post(
            "/style_transfer_bytes_and_upload_image",
            data={"prompt": "a red square", "canny": "false"},
            files={"image_file": ("a.png", file_of(disc()), "image/png")},
            headers={"Prefer": "respond-async"},
        )
        assert sent.status_code == 202
        until(lambda: client.get("/readyz").status_code == 503)
        assert any(sentence.startswith(reported) for sentence in client.get("/readyz").json()["missing"])
        os.utime(beat, (1.0, 1.0))
        time.sleep(0.3)
        assert beat.stat().st_mtime == 1.0
        let_go.set()
        until(lambda: client.get("/readyz").status_code == 200 and beat.stat().st_mtime > 1.0)
    assert not beat.exists()
