"""A server that is killed while it draws with a model of a new family: the durable jobs end with their images."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import httpx
import pytest
import tiny_families
from conftest import free_port, start_server
from fakes import until
from test_server_jobs import WATCHED, accept, answers, child_of, job

pytestmark = pytest.mark.slow

SERVE = (sys.executable, "-m", "stable_diffusion_server", "serve")
WAIT = {"model": "klein", "width": 64, "height": 64}


@pytest.mark.fault(50)
@pytest.mark.skipif(not Path("/proc").exists(), reason="finds the watchdog's child in /proc")
def test_a_server_that_is_killed_in_a_step_of_klein_draws_its_jobs_later(tmp_path: Path) -> None:
    """Kill -9 between two steps: both jobs are done after the restart; one that is late or cancelled ends at once."""
    models = tmp_path / "models"
    tiny_families.build("flux2-klein").save_pretrained(models / "klein")
    (models / "klein.toml").write_text('native_size = [64, 64]\ndtype = "float32"\n')
    port = free_port()
    settings = {"PORT": str(port), "MODELS_DIR": str(models), "MODELS": "local", "CPU_THREADS": "1"}
    server = start_server(tmp_path, port, *WATCHED, *SERVE, **settings)
    try:
        ids = [accept(server, f"a red disc {n}", num_inference_steps=60, **WAIT) for n in range(2)]
        until(lambda: time.sleep(0.01) or any((job(server, each)["step"] or 0) > 0 for each in ids), 120)
        killed = child_of(server.process)
        assert killed is not None
        os.kill(killed, signal.SIGKILL)
        until(lambda: child_of(server.process) not in (killed, None), 120)
        until(lambda: answers(server, "/readyz"), 120)
        late = accept(server, "late", num_inference_steps=150, timeout=0.2, **WAIT)
        dropped = accept(server, "cancelled", num_inference_steps=150, **WAIT)
        assert httpx.delete(f"{server.url}/jobs/{dropped}").status_code in (200, 202)
        until(lambda: all(job(server, each)["state"] in ("done", "failed") for each in ids), 240)
        ended = [job(server, each) for each in ids]
        assert [each["state"] for each in ended] == ["done", "done"], ended
        assert max(each["attempts"] for each in ended) == 2
        for each in ended:
            assert httpx.get(each["receipt"]["path"]).headers["content-type"] == "image/webp"
        until(lambda: job(server, late)["state"] == "failed", 60)
        assert job(server, late)["problem"]["status"] == 504
        until(lambda: job(server, dropped)["state"] == "cancelled", 60)
    finally:
        server.stop()
