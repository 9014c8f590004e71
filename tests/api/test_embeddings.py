"""Textual inversion over HTTP: names in prompts, the key, receipts and infotexts, and the lists."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import RunningApp
from embedding_makers import embedding_file, vectors
from fakes import FakeDenoiser

from stable_diffusion_server.pipelines.conditioning import embedding_folder

DRAW = "/create_and_upload_image"
SIZE = {"width": 256, "height": 256}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An embedding for SDXL, one for SD 1.5, a damaged one and a pickle."""
    place = tmp_path / "embeddings"
    place.mkdir()
    embedding_file(place / "inkblot.safetensors", {"clip_l": vectors(2, 768), "clip_g": vectors(2, 1280)})
    embedding_file(place / "older.safetensors", {"emb_params": vectors(4, 768)})
    (place / "broken.safetensors").write_bytes(b"no")
    (place / "oldest.pt").write_bytes(b"PK")
    return place


@pytest.fixture
def running(run_app: Callable[..., RunningApp], folder: Path) -> RunningApp:
    """A running app with the folder."""
    return run_app(FakeDenoiser(), embeddings_dir=folder)


def drawn(running: RunningApp, **given: Any) -> dict[str, Any]:
    answer = running.client.post(DRAW, json={**SIZE, "prompt": "sea", **given})
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


def asked_of_model(running: RunningApp) -> tuple[tuple[str, str], ...]:
    embeddings: tuple[tuple[str, str], ...] = running.squares.finished[-1].embeddings
    return embeddings


@pytest.mark.parametrize(
    "given",
    [
        {"prompt": "sea by Inkblot"},
        {"prompt": "sea, (inkblot:1.2)"},
        {"prompt": "sea, embedding:inkblot"},
        {"prompt": "[sea:inkblot:0.5]"},
        {"prompt": "(inkblot)1.2 sea", "prompt_syntax": "compel"},
        {"negative_prompt": "inkblot"},
        {"prompt_2": "sea by inkblot"},
    ],
)
def test_a_prompt_names_an_embedding(running: RunningApp, given: dict[str, Any]) -> None:
    """In each prompt, with weights and in other syntaxes; the model gets its name and digest."""
    body = drawn(running, **given)
    assert [name for name, _ in asked_of_model(running)] == ["inkblot"]
    assert running.squares.finished[-1].weighted
    assert body["warnings"] == []


@pytest.mark.parametrize("given", [{"prompt": "sea, inkblots"}, {"prompt": "inkblot", "prompt_syntax": "plain"}])
def test_other_prompts_name_none(
    running: RunningApp, run_app: Callable[..., RunningApp], given: dict[str, Any]
) -> None:
    """Their keys are those without a folder."""
    body = drawn(running, **given)
    assert asked_of_model(running) == ()
    assert drawn(run_app(FakeDenoiser()), **given)["key"] == body["key"]


def test_the_key_follows_the_content_of_the_file(running: RunningApp, folder: Path) -> None:
    """The same file gives the stored image, another one another image."""
    first, again = drawn(running, prompt="sea by inkblot"), drawn(running, prompt="sea by inkblot")
    assert (again["key"], again["cached"]) == (first["key"], True)
    pair = {"clip_l": vectors(2, 768, 8), "clip_g": vectors(2, 1280, 9)}
    embedding_file(folder / "inkblot.safetensors", pair)
    other = drawn(running, prompt="sea by inkblot")
    assert (other["key"] != first["key"], other["cached"]) == (True, False)


@pytest.mark.parametrize(
    ("given", "code", "said"),
    [
        ({"prompt": "sea by broken"}, "embedding-not-used", "not a safetensors file"),
        ({"prompt": "sea by oldest"}, "embedding-not-used", "convert it to .safetensors"),
        ({"prompt": "sea by inkblot", "model": "flux"}, "embedding-not-used", "reads no embeddings"),
    ],
)
def test_what_is_not_used_is_a_warning(running: RunningApp, given: dict[str, Any], code: str, said: str) -> None:
    """The name is then read as words."""
    (warning,) = drawn(running, **given)["warnings"]
    assert warning["code"] == code
    assert said in warning["message"]
    assert asked_of_model(running) == ()


def test_a_request_names_64_at_most(running: RunningApp, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The names of the others are words."""
    monkeypatch.setattr(embedding_folder, "_FRESH_SECONDS", 0.0)
    for number in range(65):
        embedding_file(folder / f"many{number}.safetensors", {"emb_params": vectors(1, 8)})
    prompt = " ".join(f"many{number}" for number in range(64))
    assert drawn(running, prompt=prompt)["warnings"] == []
    assert len(asked_of_model(running)) == 64
    (warning,) = drawn(running, prompt=f"{prompt} many64")["warnings"]
    assert "more than 64" in warning["message"]


def test_automatic1111_lists_what_the_model_reads(running: RunningApp) -> None:
    """`loaded` fit the caller's model, `skipped` are the others; the paths stay private."""
    plain = {"step": None, "sd_checkpoint": None, "sd_checkpoint_name": None}
    listed = running.client.get("/sdapi/v1/embeddings").json()
    assert listed["loaded"] == {"inkblot": {**plain, "shape": 2048, "vectors": 2}}
    assert listed["skipped"] == {
        "older": {**plain, "shape": 768, "vectors": 4},
        "broken": {**plain, "shape": 0, "vectors": 0},
        "oldest": {**plain, "shape": 0, "vectors": 0},
    }
    running.client.post("/sdapi/v1/options", json={"sd_model_checkpoint": "flux"})
    listed = running.client.get("/sdapi/v1/embeddings").json()
    assert (listed["loaded"], set(listed["skipped"])) == ({}, {"inkblot", "older", "broken", "oldest"})


def test_automatic1111_draws_and_tells_hashes(running: RunningApp) -> None:
    """The infotext has the names and the beginnings of the digests."""
    answer = running.client.post("/sdapi/v1/txt2img", json={**SIZE, "prompt": "sea by inkblot", "seed": 1})
    info = json.loads(answer.json()["info"])
    ((_, digest),) = asked_of_model(running)
    assert f'TI hashes: "inkblot: {digest[:12]}"' in info["infotexts"][0]


def test_without_a_folder_there_are_none(run_app: Callable[..., RunningApp]) -> None:
    """The default."""
    running = run_app(FakeDenoiser())
    assert running.client.get("/sdapi/v1/embeddings").json() == {"loaded": {}, "skipped": {}}
    assert drawn(running, prompt="sea by inkblot")["warnings"] == []
