"""A server that is killed while it loads a model: the jobs that waited for the model end with their images."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import httpx
import pytest
from checkpoint_stand_ins import sdxl_pipeline, write
from conftest import free_port, start_server
from fakes import until
from original_names import sdxl_tensors
from test_server_jobs import WATCHED, accept, answers, child_of, job

pytestmark = pytest.mark.slow

SERVE = (sys.executable, "-m", "stable_diffusion_server", "serve")


@pytest.mark.skipif(not Path("/proc").exists(), reason="finds the watchdog's child in /proc")
def test_a_server_that_is_killed_while_it_loads_a_model_draws_its_jobs_later(tmp_path: Path) -> None:
    """Kill -9 between two reports of the load: both jobs are done after the restart, and the next load is whole."""
    models = tmp_path / "models"
    models.mkdir()
    write(models / "own.safetensors", sdxl_tensors(sdxl_pipeline(1)))
    (models / "own.toml").write_text("native_size = [64, 64]\n")
    port = free_port()
    settings = {"PORT": str(port), "MODELS_DIR": str(models), "TEXT_TO_IMAGE_MODEL": "embedded-sdxl"}
    server = start_server(tmp_path, port, *WATCHED, *SERVE, **settings)
    try:
        ids = [accept(server, f"a red disc {n}", model="own", num_inference_steps=1) for n in range(2)]
        until(lambda: time.sleep(0.01) or any(job(server, each)["loading"] is not None for each in ids), 120)
        killed = child_of(server.process)
        assert killed is not None
        os.kill(killed, signal.SIGKILL)
        until(lambda: child_of(server.process) not in (killed, None), 120)
        until(lambda: answers(server, "/readyz"), 120)
        until(lambda: all(job(server, each)["state"] in ("done", "failed") for each in ids), 240)
        ended = [job(server, each) for each in ids]
        assert [each["state"] for each in ended] == ["done", "done"], ended
        assert max(each["attempts"] for each in ended) == 2
        for each in ended:
            assert each["receipt"]["model"] == "own"
            assert httpx.get(each["receipt"]["path"]).headers["content-type"] == "image/webp"
    finally:
        server.stop()
