"""A server with more models than memory: each request gets its own model, loading is visible, failures stay apart."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from checkpoint_stand_ins import sdxl_pipeline, write
from conftest import ROOT
from fakes import settings_in, until
from fastapi.testclient import TestClient
from original_names import sdxl_tensors

from stable_diffusion_server.app import create_app

pytestmark = pytest.mark.slow

SIZE = {"prompt": "a red disc", "width": 128, "height": 128, "num_inference_steps": 1}
# Each stand-in takes 90 MB.
ROOM_FOR_TWO = 200_000_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three checkpoints, and one whose weights do not fit their names."""
    place = tmp_path_factory.mktemp("weights")
    for seed, name in enumerate(("first", "second", "third"), 1):
        write(place / f"{name}.safetensors", sdxl_tensors(sdxl_pipeline(seed)))
    tensors = sdxl_tensors(sdxl_pipeline(4))
    write(
        place / "lacking.safetensors",
        {name: tensor for name, tensor in tensors.items() if "output_blocks.8.0." not in name},
    )
    for name in ("first", "second", "third", "lacking"):
        (place / f"{name}.toml").write_text("native_size = [128, 128]\n")
    (place / "third.toml").write_text('title = "The Third"\naliases = ["drei"]\nnative_size = [128, 128]\n')
    return place


@pytest.fixture
def start(folder: Path, tmp_path: Path) -> Iterator[Callable[..., TestClient]]:
    """Start a server over the checkpoints."""
    clients: list[TestClient] = []

    def make(client: tuple[str, int] = ("127.0.0.1", 5), **changes: Any) -> TestClient:
        values = {"models_dir": folder, "model_memory": ROOM_FOR_TWO, "text_to_image_model": "first", **changes}
        app = create_app(settings_in(tmp_path, **values))
        clients.append(TestClient(app, base_url="http://127.0.0.1:8000", client=client).__enter__())
        until(lambda: time.sleep(0.5) or clients[-1].get("/readyz").status_code == 200, seconds=300)
        return clients[-1]

    yield make
    for client in clients:
        client.__exit__(None, None, None)


def residency(client: TestClient) -> dict[str, str]:
    """Where each model is, by name."""
    return {model["name"]: model["residency"] for model in client.get("/readyz").json()["models"]}


def test_models_take_turns_in_memory(start: Callable[..., TestClient]) -> None:
    """Only the default is loaded at the start; others come when asked for, and the oldest goes; keys stay the same."""
    client = start()
    at_start = residency(client)
    assert at_start["first"] == "resident"
    assert at_start["second"] == at_start["third"] == at_start["embedded-flux"] == "unloaded"
    titles = [model["title"] for model in client.get("/sdapi/v1/sd-models").json()]
    assert "second" in titles, "no hash of a file that nobody read"
    assert any(title.startswith("first [") for title in titles)
    drawn = {}
    for name in ("first", "second", "third", "drei", "third.safetensors"):
        answer = client.get("/create_and_upload_image", params={**SIZE, "model": name})
        assert answer.status_code == 200, answer.text
        drawn[name] = answer.json()["key"]
    assert len({drawn[name] for name in ("first", "second", "third")}) == 3
    assert drawn["third"] == drawn["drei"] == drawn["third.safetensors"]
    assert residency(client)["first"] == "unloaded"
    again = client.get("/create_and_upload_image", params={**SIZE, "model": "first"}).json()
    assert again["cached"]
    assert again["key"] == drawn["first"]
    broken = client.get("/create_and_upload_image", params={**SIZE, "model": "lacking"})
    assert broken.status_code == 503
    assert "lacking" in broken.json()["detail"]
    for path in re.findall(r"POST http://localhost:8000(/models/\S+)", (ROOT / "docs" / "models.md").read_text()):
        answer = client.post(path)
        assert answer.status_code == 200, answer.text
    nearest = client.get("/create_and_upload_image", params={**SIZE, "model": "secnd"})
    assert nearest.status_code == 422
    assert "second" in nearest.json()["detail"]


def test_mixed_requests_at_once_get_their_own_models(start: Callable[..., TestClient]) -> None:
    """Twelve requests of three models, together: each picture is that of its model, none is refused."""
    client = start(queue_limit=64)

    def draw(number: int) -> tuple[str, Any]:
        name = ("first", "second", "third")[number % 3]
        answer = client.get("/create_and_upload_image", params={**SIZE, "model": name, "seed": number % 8})
        return name, answer

    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(draw, range(12)))
    for name, answer in answers:
        assert answer.status_code == 200, answer.text
        assert answer.json()["model"] == name
    assert len({answer.json()["key"] for _, answer in answers}) == 12


def test_a_job_shows_its_model_loading(start: Callable[..., TestClient]) -> None:
    """The job is accepted at once; its events say `loading` with per cent before the first step."""
    client = start()
    job = client.post("/create_and_upload_image", json={**SIZE, "model": "third"}, headers={"Prefer": "respond-async"})
    assert job.status_code == 202, job.text
    events = client.get(f"/jobs/{job.json()['id']}/events").text
    assert events.index("event: loading") < events.index("event: step") < events.index("event: done"), events
    assert '"loading":' in events


MANAGED = ("/models/second/load", "/models/second/unload", "/models/refresh")


def test_models_are_managed_by_admin_keys_only(start: Callable[..., TestClient], folder: Path) -> None:
    """Listing shows every model; a key that is not admin, and a stranger, change nothing."""
    keys = f"boss:{'s' * 32};admin,worker:{'w' * 32}"
    client = start(api_keys=keys, allow_anonymous=True)
    boss, worker = ({"Authorization": f"Bearer {letter * 32}"} for letter in "sw")
    for path in MANAGED:
        assert client.post(path, headers=worker).status_code == 403
        assert client.post(path).status_code == 403
    assert residency_of(client, boss, "second") == "unloaded"
    assert client.post("/models/second/load", headers=boss).status_code == 200
    assert residency_of(client, boss, "second") == "resident"
    assert client.post("/models/second/unload", headers=boss).status_code == 200
    assert residency_of(client, boss, "second") == "unloaded"
    assert client.post("/models/lacking/load", headers=boss).status_code == 503
    assert client.post("/models/nothing/load", headers=boss).status_code == 404
    new = folder / "sub" / "new one.safetensors"
    new.parent.mkdir()
    new.write_bytes((folder / "second.safetensors").read_bytes())
    try:
        assert client.get("/models/new one", headers=boss).status_code == 404
        assert client.post("/models/refresh", headers=boss).status_code == 200
        assert client.get("/models/new one", headers=boss).json()["residency"] == "unloaded"
        answer = client.get("/create_and_upload_image", params={**SIZE, "model": "new one"}, headers=boss)
        assert answer.status_code == 200, answer.text
    finally:
        new.unlink()
        new.parent.rmdir()
    assert client.post("/sdapi/v1/refresh-checkpoints", headers=boss).status_code == 200
    assert client.get("/models/new one", headers=boss).status_code == 404


def residency_of(client: TestClient, headers: dict[str, str], name: str) -> str:
    """Where a model is, by its own document and by the list of all."""
    one = client.get(f"/models/{name}", headers=headers).json()
    listed = {model["id"]: model for model in client.get("/v1/models", headers=headers).json()["data"]}
    assert listed[name]["residency"] == one["residency"]
    return str(one["residency"])


def test_after_a_restart_a_stored_picture_needs_no_model(start: Callable[..., TestClient], tmp_path: Path) -> None:
    """The revision of the last load is remembered, by the files: other files under the name are another model."""
    home, weights = tmp_path / "kept", tmp_path / "own"
    weights.mkdir()
    for seed, name in ((1, "first"), (2, "second")):
        write(weights / f"{name}.safetensors", sdxl_tensors(sdxl_pipeline(seed)))
    values: dict[str, Any] = {"models_dir": weights, "data_dir": home / "data", "local_bucket_dir": home / "bucket"}
    asked = {**SIZE, "model": "second", "seed": 3}
    before = start(**values).get("/create_and_upload_image", params=asked).json()
    again = start(**values)
    answer = again.get("/create_and_upload_image", params=asked).json()
    assert (answer["key"], answer["cached"]) == (before["key"], True)
    assert residency(again)["second"] == "unloaded"
    drawn = again.get("/create_and_upload_image", params={**asked, "seed": 4}).json()
    assert not drawn["cached"]
    assert residency(again)["second"] == "resident"
    write(weights / "second.safetensors", sdxl_tensors(sdxl_pipeline(3)))
    other = start(**values).get("/create_and_upload_image", params=asked).json()
    assert (other["key"] != before["key"], other["cached"]) == (True, False)
