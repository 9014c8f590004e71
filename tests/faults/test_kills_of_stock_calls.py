"""A server that is killed between two steps of a stock pipeline's call: the durable job ends with its image."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import httpx
import pytest
from conftest import free_port, start_server
from fakes import until
from test_server_jobs import CREATE, WATCHED, accept, answers, child_of, job

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

SERVE = (sys.executable, "-m", "stable_diffusion_server", "serve")


@pytest.mark.fault(50)
@pytest.mark.skipif(not Path("/proc").exists(), reason="finds the watchdog's child in /proc")
def test_a_job_of_a_stock_pipeline_survives_a_kill(tmp_path: Path) -> None:
    """Kill -9 between two steps; then the same image as without a kill, and parameters of its class over HTTP."""
    import tiny_families

    models = tmp_path / "models"
    tiny_families.build("lumina2").save_pretrained(models / "own")
    (models / "own.toml").write_text('native_size = [64, 64]\ndtype = "float32"\n')
    port = free_port()
    settings = {"PORT": str(port), "MODELS_DIR": str(models), "TEXT_TO_IMAGE_MODEL": "embedded-sdxl"}
    settings["CONTENT_CREDENTIALS"] = "off"  # a signature has a time of its own
    server = start_server(tmp_path, port, *WATCHED, *SERVE, **settings)
    try:
        wanted = {"model": "own", "num_inference_steps": 80, "width": 64, "height": 64, "seed": 5}
        number = accept(server, "a red circle", **wanted)
        until(lambda: job(server, number)["step"] > 2, 240)
        killed = child_of(server.process)
        assert killed is not None
        os.kill(killed, signal.SIGKILL)
        until(lambda: child_of(server.process) not in (killed, None), 120)
        until(lambda: answers(server, "/readyz"), 120)
        until(lambda: job(server, number)["state"] in ("done", "failed"), 240)
        ended = job(server, number)
        assert (ended["state"], ended["attempts"]) == ("done", 2), ended
        assert ended["receipt"]["model"] == "own"
        drawn = httpx.get(ended["receipt"]["path"]).content
        again = {**wanted, "prompt": "a red circle", "save_path": "again.webp"}
        whole = httpx.post(f"{server.url}{CREATE}", json=again, timeout=240)
        assert whole.status_code == 200, whole.text
        assert httpx.get(whole.json()["path"]).content == drawn
        asked = {**wanted, "prompt": "a red circle", "num_inference_steps": 2}
        for extra, status in ((("cfg_trunc_ratio", 0.25), 200), (("callback_on_step_end", "x"), 422)):
            answer = httpx.post(f"{server.url}{CREATE}", json={**asked, "extra": dict([extra])}, timeout=240)
            assert answer.status_code == status, answer.text
        assert "extra.callback_on_step_end" in answer.text
    finally:
        server.stop()
