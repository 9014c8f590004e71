"""The engine in the application.

Its metrics are exported, its failure is reported, and a lost device ends the process.
"""

from __future__ import annotations

import gc
import os
import platform
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fakes import settings_in, until
from fastapi.testclient import TestClient
from squares import DeviceLostDenoiser, FakeDenoiser, OutOfMemoryDenoiser

from stable_diffusion_server.app import ProcessHooks, create_app
from stable_diffusion_server.app.lifecycle import DEVICE_LOST_STATUS
from stable_diffusion_server.app.process_tuning import freeze_gc

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


def test_caps_and_step_times_are_in_the_metrics(run_app: Callable[..., Any]) -> None:
    """By shape: batch size cap and step time."""
    running_app = run_app()
    for n in range(2):
        assert running_app.draw(prompt=f"a square {n}", width=128, height=192).status_code == 200
    text = running_app.client.get("/metrics").text
    assert 'sds_batch_cap{shape="sdxl 128x192"} 1.0' in text
    assert 'sds_step_seconds{jobs="1",shape="sdxl 128x192"}' in text


class RecordedHooks(ProcessHooks):
    """Records the reported events, and ends no process."""

    def __init__(self) -> None:
        self.called = list[str]()

    def ready(self) -> None:
        self.called.append("ready")

    def libraries_loaded(self) -> None:
        self.called.append("libraries loaded")

    def device_lost(self) -> None:
        self.called.append("device lost")


@pytest.mark.fault(53)
def test_a_poisoned_device_is_reported_and_the_process_is_to_be_replaced(tmp_path: Path) -> None:
    """The caller gets a retryable error, /readyz gives the reason, and the hook is called."""
    hooks = RecordedHooks()
    app = create_app(settings_in(tmp_path), load=lambda settings: DeviceLostDenoiser(), hooks=hooks)
    with TestClient(app, base_url="http://127.0.0.1:8000", client=("127.0.0.1", 5)) as client:
        until(lambda: client.get("/readyz").status_code == 200)
        answer = client.get("/create_and_upload_image", params={"prompt": "poison", "width": 64, "height": 64})
        assert answer.status_code == 503
        assert answer.headers["retry-after"]
        until(lambda: hooks.called[-1] == "device lost")
        unready = client.get("/readyz")
        assert unready.status_code == 503
        assert "device" in unready.text
        assert client.get("/healthz").status_code == 200


def test_a_process_whose_device_is_lost_leaves_with_its_own_status() -> None:
    """So a watchdog can tell it from a normal exit, even while threads still wait for the device."""
    code = "from stable_diffusion_server.app.lifecycle import exit_soon; import time; exit_soon(); time.sleep(60)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, check=False)  # noqa: S603  # our own
    assert done.returncode == DEVICE_LOST_STATUS == 86


def test_once_it_can_draw_the_process_settles(tmp_path: Path) -> None:
    """Before any job is accepted, so that nobody waits for it."""
    hooks = RecordedHooks()
    app = create_app(settings_in(tmp_path), load=lambda settings: FakeDenoiser(), hooks=hooks)
    with TestClient(app):
        until(lambda: hooks.called == ["libraries loaded", "ready"])


GLIBC = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's heaps")


def told_by_a_process(code: str, how: str) -> str:
    """Output of a separate Python process, with or without malloc tuning."""
    tend = "process_tuning._TRIM_SECONDS = 0.1; process_tuning.tune_malloc()" if how == "tended" else ""
    command = [sys.executable, "-c", f"from stable_diffusion_server.app import process_tuning\n{tend}\n{code}"]
    environment = {
        name: value for name, value in os.environ.items() if name not in ("MALLOC_ARENA_MAX", "GLIBC_TUNABLES")
    }
    done = subprocess.run(  # noqa: S603  # our own
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout


@GLIBC
def test_threads_share_their_heaps() -> None:
    """Twelve threads that allocate at the same time share at most two malloc arenas."""
    code = """
import ctypes, threading
held, together = [], threading.Barrier(12)
def hold():
    together.wait()
    held.append([bytearray(1000) for _ in range(500)])
    together.wait()
threads = [threading.Thread(target=hold) for _ in range(12)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
ctypes.CDLL(None).malloc_info(0, ctypes.c_void_p.in_dll(ctypes.CDLL(None), "stdout"))
ctypes.CDLL(None).fflush(None)
"""
    heaps = {how: told_by_a_process(code, how).count("<heap nr=") for how in ("tended", "not")}
    assert heaps["tended"] <= 2 < heaps["not"]


@GLIBC
def test_what_is_free_amid_what_is_held_is_given_back() -> None:
    """Of two hundred megabytes in pieces of 100 kB every second one is freed.

    Half of them soon return to the system.
    """
    code = """
import os, time
pieces = [bytearray(100_000) for _ in range(2000)]
del pieces[::2]
time.sleep(1.5)
print(int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGESIZE"))
"""
    resident = {how: int(told_by_a_process(code, how)) for how in ("tended", "not")}
    assert resident["tended"] < resident["not"] - 60_000_000


@GLIBC
def test_memory_of_a_picture_is_used_again_for_the_next() -> None:
    """Twenty megabytes freed and allocated again: each page is requested from the system once, not each time."""
    code = """
import resource
for _ in range(50):
    held = [bytearray(5_000_000) for _ in range(4)]
    del held
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""
    faults = {how: int(told_by_a_process(code, how)) for how in ("tended", "not")}
    assert faults["tended"] < faults["not"] / 5


def test_what_is_to_be_warm_is_drawn_before_the_server_is_ready(tmp_path: Path) -> None:
    """Each size by each model, alone and batched, as a compiler needs it; nothing is stored."""
    painter, reported = FakeDenoiser(), list[int]()

    class Counting(ProcessHooks):
        def ready(self) -> None:
            reported.append(len(painter.finished))

    app = create_app(
        settings_in(tmp_path, warmup_sizes=("256x256", "384x256", "4096x4096"), models="embedded"),
        load=lambda settings: painter,
        hooks=Counting(),
    )
    with TestClient(app):
        until(lambda: reported == [6])  # the largest runs on the first one's canvas, and SDXL with guidance and without
    drawn = {(job.model, job.width, job.height, job.guidance_scale > 1) for job in painter.finished}
    assert drawn == {
        (model, width, 256, guided)
        for model, guided in (("sdxl", True), ("sdxl", False), ("flux", False))
        for width in (256, 384)
    }
    assert {len(batch) for batch in painter.batches} == {1, 2}
    assert not list((tmp_path / "bucket" / "objects").iterdir())


@pytest.mark.parametrize("wrong", [{"fits": 1}, {"fits": 0}, {"decodes_with": 1}])
def test_what_cannot_be_warmed_up_is_reported_and_harms_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], wrong: dict[str, int]
) -> None:
    """Memory too small for a batch of two, for an image, or for decoding: the server is ready all the same."""
    painter = OutOfMemoryDenoiser(**wrong)
    app = create_app(settings_in(tmp_path, warmup_sizes=("256x256",), models="embedded"), load=lambda settings: painter)
    with TestClient(app, base_url="http://127.0.0.1:8000") as client:
        until(lambda: client.get("/readyz").status_code == 200)
    assert painter.released >= 3
    assert "not warmed up" in "".join(capsys.readouterr())


def test_with_one_job_at_a_time_no_pair_is_drawn_to_be_warm(tmp_path: Path) -> None:
    """With a maximum batch size of one, no batch of two is tried."""
    painter = OutOfMemoryDenoiser(fits=1)
    settings = settings_in(tmp_path, warmup_sizes=("256x256",), models="embedded", max_batch=1)
    with TestClient(create_app(settings, load=lambda settings: painter)):
        until(lambda: len(painter.finished) == 3)
    assert painter.released == 0


def test_a_settled_process_has_nothing_old_for_the_collector_to_look_through() -> None:
    """Garbage is collected, and the rest is frozen: no full collection pauses all threads for long."""

    class Ring:
        """An object that only the garbage collector can free."""

        def __init__(self) -> None:
            self.itself = self

    ends = list[None]()
    ring = Ring()
    weakref.finalize(ring, ends.append, None)
    del ring
    try:
        freeze_gc()
        assert ends == [None]
        assert gc.get_freeze_count() > 10_000
        assert len(gc.get_objects()) < 1000
    finally:
        gc.unfreeze()
