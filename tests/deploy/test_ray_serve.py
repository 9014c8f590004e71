"""Two replicas under Ray Serve, started by one command. Needs `RAY_PYTHON`, a Python with Ray (`make ray-test`)."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from conftest import ROOT, Server, free_port, start_server
from fakes import until

PYTHON = os.environ.get("RAY_PYTHON", "")
pytestmark = [
    pytest.mark.skipif(not PYTHON, reason="RAY_PYTHON names no Python with Ray; `make ray-test` does"),
    pytest.mark.timeout(1200),
]
CREATE = "/create_and_upload_image"
ASYNC = {"Prefer": "respond-async"}
SMALL = {"width": 128, "height": 128}


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two replicas over one local bucket."""
    port = free_port()
    command = (PYTHON, "-m", "deploy.ray_serve", "--replicas", "2", "--cpus", "1")
    settings = {"MODELS": "embedded", "CPU_THREADS": "1", "OMP_NUM_THREADS": "1", "UI": "0", "QUEUE_LIMIT": "8"}
    server = start_server(tmp_path_factory.mktemp("ray"), port, *command, seconds=400, PORT=str(port), **settings)
    until(lambda: "replicas draw at" in server.log.read_text(), 200)
    yield server
    server.process.terminate()
    assert server.process.wait(120) == 0


def replicas(server: Server) -> list[psutil.Process]:
    return [
        child
        for child in psutil.Process(server.process.pid).children(recursive=True)
        if child.status() != psutil.STATUS_ZOMBIE and "ServeReplica" in " ".join(child.cmdline())
    ]


def asked(server: Server, **order: Any) -> httpx.Response:
    return httpx.post(f"{server.url}{CREATE}", json={"prompt": "a red circle", **SMALL, **order}, timeout=120)


def accepted(server: Server, **order: Any) -> str:
    wanted = {"prompt": "a blue square", **SMALL, **order}
    answer = httpx.post(f"{server.url}{CREATE}", json=wanted, headers=ASYNC, timeout=120)
    assert answer.status_code == 202, answer.text
    return str(answer.headers["location"])


def test_equal_orders_at_once_are_one_object_and_distinct_ones_their_own(both: Server) -> None:
    """On either replica: one URL for the equal requests, a separate file for each other."""
    with ThreadPoolExecutor(12) as pool:
        equal = list(pool.map(lambda _: asked(both, seed=1, save_path="ray/equal.webp"), range(6)))
        distinct = list(pool.map(lambda seed: asked(both, seed=seed), range(100, 106)))
    assert {answer.status_code for answer in equal + distinct} == {200}
    assert len({answer.json()["path"] for answer in equal}) == 1
    assert len({answer.json()["path"] for answer in distinct}) == 6
    assert len(list((both.folder / "bucket" / "objects").rglob("equal.webp"))) == 1
    assert all(httpx.get(answer.json()["path"]).status_code == 200 for answer in equal + distinct)


def test_any_replica_answers_for_a_job(both: Server) -> None:
    """Twenty new connections, two replicas: each knows the job, and its events end."""
    where = accepted(both, seed=2, num_inference_steps=8)
    statuses = [httpx.get(f"{both.url}{where}").status_code for _ in range(20)]
    assert statuses == [200] * 20
    assert "event: done" in httpx.get(f"{both.url}{where}/events", timeout=120).text
    assert httpx.get(f"{both.url}/jobs/r0-nobody-ever-had-this-id").status_code == 404


def test_a_full_house_says_when_to_come_back(both: Server) -> None:
    """More requests than two queues hold: some succeed, the rest gets Retry-After, none fails."""
    with ThreadPoolExecutor(60) as pool:
        answers = list(pool.map(lambda seed: asked(both, seed=seed, num_inference_steps=30), range(1000, 1060)))
    assert {answer.status_code for answer in answers} == {200, 429}
    assert all(int(answer.headers["retry-after"]) > 0 for answer in answers if answer.status_code == 429)


def test_a_replica_that_is_killed_loses_no_accepted_job(both: Server, tmp_path: Path) -> None:
    """The replacement continues its accepted jobs; meanwhile no replica reports a job as unknown."""
    places = [accepted(both, seed=seed, num_inference_steps=20) for seed in range(2000, 2012)]
    victims = replicas(both)
    assert len(victims) == 2
    victims[0].kill()
    seen: set[int] = set()

    def ended() -> bool:
        answers = [httpx.get(f"{both.url}{where}", timeout=60) for where in places]
        seen.update(answer.status_code for answer in answers)
        return all(answer.status_code == 200 and answer.json()["state"] == "done" for answer in answers)

    until(ended, 240)
    # Ray's own proxy answers 500 for a request whose replica dies.
    assert seen <= {200, 500, 503}
    until(lambda: len(replicas(both)) == 2, 120)


def test_the_kubernetes_examples_application_is_one_that_ray_builds() -> None:
    """Ray's own schema accepts its Serve configuration, and the application is built with its arguments."""
    code = """
import pathlib, yaml
from ray.serve.schema import ServeDeploySchema
from deploy.ray_serve import Scale, application
_, service = yaml.safe_load_all(pathlib.Path("deploy/kuberay.yaml").read_text())
config = yaml.safe_load(service["spec"]["serveConfigV2"])
ServeDeploySchema.model_validate(config)
print(application(Scale(**config["applications"][0]["args"])))
"""
    done = subprocess.run([PYTHON, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)  # noqa: S603  # ours
    assert done.returncode == 0, done.stderr
    assert "Application" in done.stdout
