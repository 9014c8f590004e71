"""Which weights the settings ask for, and what users see of them: chosen, given way, missing, told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import House
from fakes import PaintedSquares, lora_file, settings_in, until
from fastapi.testclient import TestClient

from stable_diffusion_server.app import create_app
from stable_diffusion_server.app.drawing import Loaded

Making = Callable[..., House]


@pytest.mark.parametrize(
    ("models", "present", "folders"),
    [
        ("auto", [], {"sdxl": "embedded-sdxl", "flux": "embedded-flux"}),
        ("auto", ["ProteusV0.2"], {"sdxl": "ProteusV0.2", "flux": "embedded-flux"}),
        ("embedded", ["ProteusV0.2"], {"sdxl": "embedded-sdxl", "flux": "embedded-flux"}),
        ("local", ["stable-diffusion-xl-base-1.0"], {"sdxl": "stable-diffusion-xl-base-1.0"}),
        ("hub", [], {"sdxl": "ProteusV0.2", "flux": "FLUX.1-schnell"}),
    ],
)
def test_the_models_folder_and_the_setting_decide(
    models: str, present: list[str], folders: dict[str, str], tmp_path: Path
) -> None:
    """MODELS × what lies in MODELS_DIR, before anything is loaded."""
    for folder in present:
        (tmp_path / "weights" / folder).mkdir(parents=True)
    loaded = Loaded.of(settings_in(tmp_path, models=models, models_dir=tmp_path / "weights"))
    assert {name: facts.folder for name, facts in loaded.facts.items()} == folders
    assert loaded.fault is None


def test_the_lcm_lora_and_finer_weights_are_other_models(tmp_path: Path) -> None:
    """LOAD_LCM_LORA and QUANTIZE show in the revision, so pictures of one are never taken for those of the other."""
    (tmp_path / "weights" / "ProteusV0.2").mkdir(parents=True)
    settings = settings_in(tmp_path, models_dir=tmp_path / "weights", load_lcm_lora=True, quantize="int8")
    facts = Loaded.of(settings).facts
    assert facts["sdxl"].revision == "proteus-0.2+lcm+int8"
    assert facts["sdxl"].default_scheduler == "lcm"
    assert facts["flux"].revision.endswith("+int8")


def test_without_any_weights_the_server_says_so_and_answers_what_is_stored(tmp_path: Path) -> None:
    """MODELS=local and an empty folder: one sentence in /readyz, 503 for what has to be drawn, and a live process."""
    (tmp_path / "empty").mkdir()
    settings = settings_in(tmp_path, models="local", models_dir=tmp_path / "empty")
    with TestClient(create_app(settings), base_url="http://127.0.0.1:8000", client=("127.0.0.1", 5)) as client:
        until(lambda: "MODELS=local" in client.get("/readyz").text)
        answer = client.get("/create_and_upload_image", params={"prompt": "a red disc"})
        assert (answer.status_code, client.get("/healthz").status_code) == (503, 200)
        assert "MODELS=local" in answer.json()["detail"]
        assert client.get("/readyz").json()["models"] == []


def test_an_adapter_is_known_by_the_name_of_its_file(house_of: Making, tmp_path: Path) -> None:
    """LORA_DIR's files may be named; others, and paths, are refused by the parameter's name."""
    folder = tmp_path / "loras"
    folder.mkdir()
    lora_file(folder / "pastel.safetensors")
    house = house_of(PaintedSquares(), lora_dir=folder)
    assert house.draw(prompt="a red disc", lora="pastel:0.8").status_code == 200
    (job,) = house.squares.prepared
    assert job.loras == (("pastel", 0.8),)
    assert len(job.lora_digests) == 1
    for name in ("other", "../loras/pastel", "pastel.safetensors"):
        refused: Any = house.draw(prompt="a red disc", lora=name)
        assert (refused.status_code, refused.json()["field"]) == (422, "lora")
