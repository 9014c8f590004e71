"""Faults of the machine: no weights, no space, a read-only disk, a clock that jumps."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import ROOT, RunningApp, free_port
from fakes import FakeDenoiser, settings_in, until
from fastapi.testclient import TestClient

from stable_diffusion_server.app import create_app

pytestmark = pytest.mark.slow

CREATE = "/create_and_upload_image"
ORDER = {"prompt": "a red square", "width": 64, "height": 64}
_WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def missing(models: Path) -> None:
    (models / "embedded-sdxl" / _WEIGHTS).unlink()


def truncated(models: Path) -> None:
    weights = models / "embedded-sdxl" / _WEIGHTS
    weights.write_bytes(weights.read_bytes()[:1000])


def of_another_class(models: Path) -> None:
    shutil.copy(models / "embedded-flux" / "model_index.json", models / "embedded-sdxl")


@pytest.mark.fault(57)
@pytest.mark.parametrize("damage", [missing, truncated, of_another_class])
def test_a_server_without_sound_weights_says_so_and_serves_the_rest(
    tmp_path: Path, damage: Callable[[Path], None], capfd: pytest.CaptureFixture[str]
) -> None:
    """The process stays up, /readyz names the model, requests get 503, and nobody sees a stack trace."""
    models = tmp_path / "models"
    for name in ("embedded-sdxl", "embedded-flux"):
        shutil.copytree(ROOT / "models" / name, models / name)
    damage(models)
    app = create_app(settings_in(tmp_path, models="embedded", models_dir=models, cpu_threads=1))
    with TestClient(app, base_url="http://127.0.0.1", client=("127.0.0.1", 5)) as client:
        until(lambda: client.get("/readyz").json().get("missing") != ["The models are loading."], 60)
        unready = client.get("/readyz")
        assert unready.status_code == 503
        assert "sdxl" in unready.json()["missing"][0]
        assert client.get("/healthz").status_code == 200
        refused = client.get(CREATE, params=ORDER)
        assert (refused.status_code, refused.json()["type"].rsplit(":", 1)[1]) == (503, "weights-unusable")
        assert "sdxl" in refused.json()["detail"]
    assert "Traceback" not in "".join(capfd.readouterr())


# A private disk, full or read-only as the test needs it, that no other process sees.
_ON_A_DISK = """
mount -t tmpfs -o size=1m none "$1" || exit 77
case "$2" in
  read-only) mount -o remount,ro "$1" ;;
  full) head -c 1m /dev/zero > "$1/ballast" 2>/dev/null; true ;;
esac
shift 2
exec "$@"
"""


@pytest.mark.fault(47)
@pytest.mark.skipif(shutil.which("unshare") is None, reason="makes a disk in a namespace of Linux")
@pytest.mark.parametrize("disk", ["read-only", "full"])
def test_a_server_whose_disk_takes_nothing_starts_and_says_so(tmp_path: Path, disk: str) -> None:
    """DATA_DIR cannot be written: /healthz answers, a job is refused with 503, and nothing is accepted and lost."""
    port, mounted = free_port(), tmp_path / "disk"
    mounted.mkdir()
    command = ["unshare", "-rm", "sh", "-c", _ON_A_DISK, "sh", str(mounted), disk]
    serve = [sys.executable, str(ROOT / "tests" / "painted_server.py")]
    places = {"DATA_DIR": str(mounted / "data"), "LOCAL_BUCKET_DIR": str(tmp_path / "bucket"), "PORT": str(port)}
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(  # noqa: S603  # our own server
            [*command, *serve],
            cwd=tmp_path,
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **places},
            stdout=log,
            stderr=log,
        )
    try:
        until(lambda: process.poll() is not None or answers(port, "/healthz"), 60)
        if process.poll() in (1, 77):
            pytest.skip("this machine lets nobody mount a disk of his own")
        refused = httpx.post(f"{at(port)}{CREATE}", json=ORDER, headers={"Prefer": "respond-async"}, timeout=60)
        assert (refused.status_code, refused.headers["content-type"]) == (503, "application/problem+json")
        assert answers(port, "/healthz")
        assert 'sds_jobs_total{outcome="started"}' not in httpx.get(f"{at(port)}/metrics").text
        assert "Traceback" not in (tmp_path / "log").read_text()
    finally:
        process.terminate()
        process.wait(60)


def at(port: int) -> str:
    return f"http://127.0.0.1:{port}"


def answers(port: int, path: str) -> bool:
    try:
        return httpx.get(f"{at(port)}{path}", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.parametrize("jump", [-3600.0, 86_400.0 * 400])
def test_a_clock_that_jumps_while_pictures_are_drawn_changes_nothing(
    run_app: Callable[..., RunningApp], monkeypatch: pytest.MonkeyPatch, jump: float
) -> None:
    """Back an hour, or forward a year: requests with a timeout succeed, jobs end, and stored images are found."""
    running_app = run_app(FakeDenoiser(seconds_per_step=0.02), rate_limit="1000/minute")
    asked: dict[str, Any] = {"timeout": 30, "save_path": "before.webp"}
    answer = running_app.client.post(CREATE, json={**ORDER, **asked}, headers={"Prefer": "respond-async"})
    right = time.time
    monkeypatch.setattr(time, "time", lambda: right() + jump)
    until(lambda: running_app.client.get(answer.headers["location"]).json()["state"] == "done")
    assert running_app.draw(prompt="a red square", timeout=30, save_path="after.webp").status_code == 200
    assert running_app.draw(prompt="a red square", save_path="before.webp").json()["cached"]
    assert running_app.client.get("/readyz").status_code == 200
