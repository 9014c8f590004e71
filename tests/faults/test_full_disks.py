"""A full, read-only or broken disk counts as a storage outage: accepted jobs wait and finally run."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from conftest import ROOT, RunningApp, free_port
from fakes import FakeDenoiser, until
from storage_servers import KEYS, MisbehavingStore, StorageServer, make_s3_bucket

pytestmark = pytest.mark.slow

CREATE = "/create_and_upload_image"
ASYNC = {"prefer": "respond-async"}


def order(number: int) -> dict[str, object]:
    return {"prompt": f"a red square {number}", "width": 64, "height": 64, "save_path": f"{number}.webp"}


def accepted(client: httpx.Client, number: int) -> str:
    answer = client.post(CREATE, json=order(number), headers=ASYNC)
    assert answer.status_code == 202, answer.text
    return str(answer.headers["location"])


@pytest.fixture
def quick_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shortens the retry interval of jobs that wait for a disk."""
    monkeypatch.setattr("stable_diffusion_server.jobs.worker._STORAGE_RETRY_SECONDS", 0.2)


@pytest.mark.fault(137)
@pytest.mark.usefixtures("quick_waits")
@pytest.mark.parametrize("name", ["ENOSPC", "EDQUOT", "EROFS", "EIO"])
def test_jobs_wait_for_a_disk_that_takes_nothing(
    run_app: Callable[..., RunningApp], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Six accepted, then every write to the disk fails: none of them fails, new ones are refused, /readyz says why.

    The disk error is raised where files are synced, since a test cannot break a disk in each way.
    """
    running_app = run_app(FakeDenoiser(seconds_per_step=0.1))
    jobs = [accepted(running_app.client, number) for number in range(6)]
    sure, broken = os.fsync, True

    def fsync(handle: int) -> None:
        if broken:
            raise OSError(getattr(errno, name), os.strerror(getattr(errno, name)))
        sure(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    assert running_app.client.post(CREATE, json=order(8)).status_code == 503
    until(lambda: running_app.client.get("/readyz").status_code == 503, 60)
    assert os.strerror(getattr(errno, name)) in running_app.client.get("/readyz").json()["missing"][0]
    refused = running_app.client.post(CREATE, json=order(7), headers=ASYNC)
    assert (refused.status_code, refused.json()["type"].rsplit(":", 1)[1]) == (503, "storage-unavailable")
    assert refused.headers["retry-after"]
    time.sleep(1)  # some retries of the jobs
    states = {running_app.client.get(job).json()["state"] for job in jobs}
    assert states <= {"queued", "running", "done"}, states
    broken = False
    until(lambda: {running_app.client.get(job).json()["state"] for job in jobs} == {"done"}, 180)
    until(lambda: running_app.client.get("/readyz").status_code == 200, 60)
    assert running_app.client.post(CREATE, json=order(8)).status_code == 200


@pytest.mark.fault(137)
@pytest.mark.usefixtures("quick_waits")
def test_a_job_that_waits_for_the_disk_can_be_cancelled_and_has_its_deadline(
    run_app: Callable[..., RunningApp], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cancelled by its id, or ended by its own timeout, while the disk is still full."""
    running_app = run_app(FakeDenoiser(seconds_per_step=0.05))
    late = running_app.client.post(CREATE, json={**order(1), "timeout": 3}, headers=ASYNC).headers["location"]
    other = accepted(running_app.client, 2)
    monkeypatch.setattr("stable_diffusion_server.files.disk_space.MIN_FREE_BYTES", 2**70)
    until(lambda: running_app.client.get("/readyz").status_code == 503, 60)
    if running_app.client.get(other).json()["state"] != "done":
        assert running_app.client.delete(other).json()["state"] == "cancelled"
    until(lambda: running_app.client.get(late).json()["state"] in ("failed", "done"), 30)


@pytest.mark.fault(137)
@pytest.mark.usefixtures("quick_waits")
def test_jobs_wait_when_neither_the_bucket_nor_the_spool_takes_anything(
    run_app: Callable[..., RunningApp],
    s3_server: StorageServer,
    rascal_before: Callable[[StorageServer], MisbehavingStore],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The bucket down and DATA_DIR full: the same as a full folder; recovery of either is enough."""
    rascal, name = rascal_before(s3_server), make_s3_bucket(s3_server)
    keys = {key: value.get_secret_value() for key, value in KEYS.items()}
    where = {"storage_provider": "r2", "bucket_name": name, "r2_endpoint_url": rascal.url, "storage_timeout": 3.0}
    running_app = run_app(FakeDenoiser(seconds_per_step=0.05), **where, **keys)
    jobs = [accepted(running_app.client, number) for number in range(4)]
    rascal.rule = lambda method, path, headers: "close"
    monkeypatch.setattr("stable_diffusion_server.files.disk_space.MIN_FREE_BYTES", 2**70)
    running_app.client.post(CREATE, json=order(9))  # detects that the bucket is down
    until(lambda: running_app.client.get("/readyz").status_code == 503, 60)
    assert running_app.client.post(CREATE, json=order(7), headers=ASYNC).status_code == 503
    assert not [job for job in jobs if running_app.client.get(job).json()["state"] == "failed"]
    rascal.rule = lambda method, path, headers: ""
    until(lambda: {running_app.client.get(job).json()["state"] for job in jobs} == {"done"}, 180)
    until(lambda: running_app.client.get("/readyz").status_code == 200, 60)


_ON_A_SMALL_DISK = 'mount -t tmpfs -o size=40m none "$1" || exit 77; shift; exec "$@"'


@pytest.fixture
def on_a_small_disk(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A server whose bucket is on a separate disk of 40 MB: its URL, and the disk as seen from outside."""
    if shutil.which("unshare") is None:
        pytest.skip("makes a disk in a namespace of Linux")
    mounted, port = tmp_path / "disk", free_port()
    mounted.mkdir()
    serve = [sys.executable, str(ROOT / "tests" / "painted_server.py"), "0.3"]
    places = {"DATA_DIR": str(tmp_path / "data"), "LOCAL_BUCKET_DIR": str(mounted / "bucket"), "PORT": str(port)}
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(  # noqa: S603  # our own server
            [shutil.which("unshare") or "", "-rm", "sh", "-c", _ON_A_SMALL_DISK, "sh", str(mounted), *serve],
            cwd=tmp_path,
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **places},
            stdout=log,
            stderr=log,
        )
    try:
        until(lambda: process.poll() is not None or ready(port), 90)
        if process.poll() in (1, 77):
            pytest.skip("this machine lets nobody mount a disk of his own")
        yield f"http://127.0.0.1:{port}", Path(f"/proc/{process.pid}/root") / mounted.relative_to("/")
    finally:
        process.terminate()
        process.wait(60)


def ready(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/readyz", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.fault(137)
def test_a_bucket_on_a_full_disk_loses_no_accepted_job(on_a_small_disk: tuple[str, Path]) -> None:
    """A real disk, filled while twelve jobs wait, and freed after a while: all twelve are done, none failed."""
    url, disk = on_a_small_disk
    with httpx.Client(base_url=url, timeout=60) as client:
        jobs = [accepted(client, number) for number in range(12)]
        ballast = disk / "ballast"
        with ballast.open("wb") as file:
            try:
                while True:
                    file.write(bytes(65_536))
                    file.flush()
            except OSError as error:
                full = error.errno
        assert full == errno.ENOSPC
        until(lambda: client.get("/readyz").status_code == 503, 90)
        new = [client.post(CREATE, json=order(50 + n), headers=ASYNC).status_code for n in range(3)]
        time.sleep(8)  # longer than a job's retry interval
        waiting = [client.get(job).json()["state"] for job in jobs]
        ballast.unlink()
        until(lambda: client.get("/readyz").status_code == 200, 90)
        until(lambda: {client.get(job).json()["state"] for job in jobs} == {"done"}, 180)
        print(f"full: new {new}, jobs {waiting}; with space: {len(jobs)} of {len(jobs)} done")  # noqa: T201  # shown with -s
        assert new == [503, 503, 503]
        assert "failed" not in waiting
