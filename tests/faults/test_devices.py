"""A device without memory, a lost device, a missing compiler: callers get an error, and the next requests succeed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import ROOT, RunningApp, free_port, start_server
from fakes import until
from squares import OutOfMemoryDenoiser
from test_server_jobs import SERVE, WATCHED, answers, child_of

from stable_diffusion_server.errors import ModelLoadError

pytestmark = pytest.mark.slow

CREATE = "/create_and_upload_image"
ORDER = {"prompt": "a red square", "width": 64, "height": 64}
# Allocates so much of the device's free memory, prints a line, and holds it until it is to exit.
_HOG = """
import sys, torch
free, _ = torch.cuda.mem_get_info()
held = torch.empty(int(free * float(sys.argv[1])), dtype=torch.uint8, device="cuda")
print("held", flush=True)
sys.stdin.read()
"""


@pytest.mark.fault(51, 52)
def test_while_another_takes_the_memory_callers_get_retry_after(run_app: Callable[..., RunningApp]) -> None:
    """503 with Retry-After and nothing stored; when the other program has ended, the same request succeeds."""
    painter = OutOfMemoryDenoiser(fits=0)
    running_app = run_app(painter)
    refused = running_app.draw(prompt="a red square", save_path="a.webp")
    assert (refused.status_code, refused.json()["type"].rsplit(":", 1)[1]) == (503, "out-of-memory")
    assert int(refused.headers["retry-after"]) > 0
    assert running_app.client.get("/files/static/uploads/a.webp").status_code == 404
    assert running_app.client.get("/readyz").status_code == 200
    painter.fits = 1
    drawn = running_app.draw(prompt="a red square", save_path="a.webp")
    assert (drawn.status_code, drawn.json()["cached"]) == (200, False)


@pytest.mark.fault(53)
@pytest.mark.skipif(not Path("/proc").exists(), reason="finds the watchdog's child in /proc")
def test_a_server_that_loses_its_device_is_replaced(tmp_path: Path) -> None:
    """The caller gets a retryable error, the process ends with its own status, and the next one generates."""
    port = free_port()
    server = start_server(tmp_path, port, *WATCHED, *SERVE, PORT=str(port))
    try:
        first = child_of(server.process)
        lost = httpx.get(f"{server.url}{CREATE}", params={**ORDER, "prompt": "poison"}, timeout=60)
        assert (lost.status_code, int(lost.headers["retry-after"]) > 0) == (503, True)
        until(lambda: child_of(server.process) not in (first, None), 60)
        until(lambda: answers(server, "/readyz"), 60)
        assert httpx.get(f"{server.url}{CREATE}", params=ORDER, timeout=60).status_code == 200
        assert "status 86" in server.log.read_text()
    finally:
        server.stop()


@pytest.mark.fault(52)
@pytest.mark.gpu
@pytest.mark.parametrize("share", [0.95, 0.999])
def test_a_device_that_another_has_filled_is_used_as_it_is_or_refused_in_a_sentence(share: float) -> None:
    """The remaining memory decides the placement; too little is an error with both numbers, not a crash."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    from stable_diffusion_server.pipelines import registry

    with _hogged(share):
        devices, reported = set(), ""
        try:
            devices = {model.device for model in registry.load(ROOT / "models", "cuda", 1).loaded}
        except ModelLoadError as error:
            reported = error.detail
        assert devices == {"cuda"} or "memory" in reported


@pytest.mark.fault(59)
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")  # torch's own, when it compiles
def test_without_a_compiler_the_model_draws_as_it_is(families: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """PERFORMANCE=compile where nothing can be compiled: the first image is generated, and is the usual one."""
    import torch._inductor.config as compiling
    from drawing import draw, job_for, psnr

    from stable_diffusion_server.pipelines.registry import LoadOptions, load

    monkeypatch.setattr(compiling.cpp, "cxx", ("no-such-compiler",))
    job = job_for("sdxl", width=64, height=64, num_inference_steps=1)
    registry = load(ROOT / "models", "cpu", 1, LoadOptions(performance="layout,compile"))
    assert psnr(draw(registry, job), draw(families["sdxl"], job)) > 50


@contextmanager
def _hogged(share: float) -> Iterator[None]:
    hog = subprocess.Popen(  # noqa: S603  # our own program
        [sys.executable, "-c", _HOG, str(share)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert hog.stdin is not None
    assert hog.stdout is not None
    try:
        assert hog.stdout.readline() == b"held\n"
        yield
    finally:
        hog.stdin.close()
        hog.wait(60)
        hog.stdout.close()
